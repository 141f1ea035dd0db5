#!/usr/bin/env python3
#
# Functional test of contrib/snapshot/host without QEMU: what the library does
# with a program that is none, and with files that are not what they should be
#
# SPDX-License-Identifier: GPL-2.0-or-later

import ctypes
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import threading
import time

from snapshot.hosts import HostTest
from snapshot.machines import HOST, MachinesTest, host_programs

HERE = Path(__file__).resolve().parent


class FakeTest(HostTest):

    def start(self, mode, *lines, name='vm'):
        fake = HERE / 'snapshot-host' / 'fake-qemu.py'
        return self.describe(f'qemu = {fake}', 'channel = 256K', 'boot = 20',
                             *lines, f'-fake {mode}', name=name)


class Fake(FakeTest):
    """
    A program that is no QEMU, but does as the protocol's page says, or does
    not. Catches an error that is not told, or waited for for ever.
    """

    def test_refused(self):
        lib = self.lib
        for mode, code, words in (
                ('version', lib.E_PROTOCOL, 'version 2 .* version 1'),
                ('magic', lib.E_PROTOCOL, 'not a snapshot device'),
                ('outside', lib.E_PROTOCOL, 'outside the channel'),
                ('beyond', lib.E_PROTOCOL, 'outside the channel'),
                ('short', lib.E_PROTOCOL, '131072 bytes, not 262144'),
                ('close', lib.E_PROTOCOL, 'closed the connection'),
                # It ends between two messages.
                ('deaf', lib.E_START, 'status 0'),
                ('silent', lib.E_BUSY, 'no HELLO'),
                ('start', lib.E_START, r'(?s)status 3.*QEMU warns.*says hello'),
                ('mute', lib.E_NOT_READY, r'(?s)READY in 2 s.*says hello')):
            with self.subTest(mode):
                path = self.start(mode, 'boot = 2', name=mode)
                start = time.monotonic()
                self.assert_fails(code, words, lib.Machine, path)
                self.assertLess(time.monotonic() - start, 20)

    def test_description(self):
        """What is wrong is told with its line, and what would be right."""
        for line, words in (('timeout = soon', r':3: "timeout = soon".*number'),
                            ('channel = 3M', 'power of 2'),
                            ('channel = 99999999999999G', 'number'),
                            ('channel = 32G', 'from 64K to 16G'),
                            ('map = 2G', 'from 4K to 1G'),
                            ('boot = 0', 'from 1 to 86400'),
                            ('boot = 18446744073709552', 'to 86400'),
                            ('timeout = 18446744073710', 'up to 86400000'),
                            ('guest-timeout = 18446744073709551617',
                             'up to 86400000'),
                            ('idle = 18446744073709552', 'up to 31536000'),
                            ('chanel = 2M', 'one of qemu, device, channel'),
                            ('coverage = all', '"guest" or "tcg"'),
                            ('quiet', 'neither'),
                            ('\0', 'not a text')):
            path = self.describe('qemu = true', '# a comment', line)
            self.assert_fails(self.lib.E_DESCRIPTION, words,
                              self.lib.Machine, path)
        path = self.describe('-m 32M')
        self.assert_fails(self.lib.E_DESCRIPTION, 'no "qemu =',
                          self.lib.Machine, path)
        self.assert_fails(self.lib.E_SYSTEM, 'No such file', self.lib.Machine,
                          '/nowhere')
        self.assert_fails(self.lib.E_START, '(?s)127.*cannot start /no/qemu',
                          self.lib.Machine, self.describe('qemu = /no/qemu'))

    def test_no_file(self):
        """Catches a description that is waited for, or read without end."""
        path = Path(self.scratch_file('other'))
        os.mkfifo(path)
        for file, words in ((path, 'is not a file'), ('/', 'is not a file'),
                            ('/dev/zero', 'is not a file')):
            self.apart_fails(10, self.lib.E_DESCRIPTION, words,
                             self.lib.Machine, file)
        path.unlink()
        with open(path, 'wb') as f:
            f.truncate(1 << 40)
        self.apart_fails(10, self.lib.E_DESCRIPTION, '1048576 at most',
                         self.lib.Machine, path)

    def test_directory(self):
        """Catches a directory that others may write to, and a cut name."""
        path = self.start('ok')
        os.chmod(self.directory, 0o777)
        self.assert_fails(self.lib.E_SYSTEM, 'alone', self.lib.Machine, path)
        os.chmod(self.directory, 0o700)
        os.environ['SNAPSHOT_VM_DIR'] = self.directory + 80 * 'x'
        self.assert_fails(self.lib.E_SYSTEM, 'too long', self.lib.Machine,
                          path)

    def test_arguments(self):
        """Catches an option that is split, or not expanded."""
        path = self.start('ok', '-append  two  words ', '-x ${instance}:$1',
                          '-y ${directory}/y')
        with self.lib.Machine(path, 3) as vm:
            args = Path(f'/proc/{self.qemu(path, 3)}/cmdline').read_bytes()
            for arg in ('two  words', '3:$1', f'{vm.directory}/y'):
                self.assertIn(b'\0' + arg.encode() + b'\0', args)
        # There is no instance 0 that this begins with.
        self.assertEqual(self.lib.stop(path), 1)

    def test_runs(self):
        path = self.start('ok')
        with self.lib.Machine(path) as vm:
            for length in (0, 1, vm.input_size):
                self.assertEqual(vm.run(bytes(length)).host_ns, 1000 + length)
            self.assert_fails(self.lib.E_LENGTH, 'takes 65536', vm.run,
                              bytes(vm.input_size + 1))
            self.assertEqual(vm.run(b'').host_ns, 1000)

    def test_died(self):
        """Catches a QEMU that has ended, but is taken for the guest."""
        for mode, words in (('crash', 'signal 11'), ('exit', 'status 0')):
            path = self.start(mode, name=mode)
            with self.lib.Machine(path) as vm:
                self.assert_fails(self.lib.E_DIED, words, vm.run, b'')
                self.assert_fails(self.lib.E_DIED, 'restart', vm.run, b'')
                vm.restart()
                self.assert_fails(self.lib.E_DIED, words, vm.run, b'')

    def test_stuck(self):
        path = self.start('stuck', 'timeout = 1000')
        with self.lib.Machine(path) as vm:
            start = time.monotonic()
            self.assert_fails(self.lib.E_STUCK, 'not answer', vm.run, b'')
            self.assertLess(time.monotonic() - start, 20)

    def test_ended(self):
        """The guest was reset by hand: one run has no result."""
        with self.lib.Machine(self.start('ended')) as vm:
            self.assert_fails(self.lib.E_ENDED, 'reset', vm.run, b'')
            self.assertEqual(vm.run(b'').result, self.lib.OK)
        with self.lib.Machine(self.start('type', name='type')) as vm:
            self.assert_fails(self.lib.E_PROTOCOL, 'type 99', vm.run, b'')

    def test_instances(self):
        """Catches a machine that two have, and one that is started in vain."""
        path = self.start('ok')
        with self.lib.Machine(path) as first:
            self.assertEqual(first.instance, 0)
            self.assert_fails(self.lib.E_BUSY, f'process {os.getpid()}',
                              self.lib.Machine, path, 0)
            with self.lib.Machine(path) as second:
                self.assertEqual(second.instance, 1)
                self.assertNotEqual(self.qemu(path, 0), self.qemu(path, 1))
            self.assertEqual(first.run(b'').result, self.lib.OK)
        before = self.qemu(path, 0)
        with self.lib.Machine(path) as again:
            self.assertEqual((again.instance, self.qemu(path, 0)),
                             (0, before))
        # The one that runs comes first.
        self.assertEqual(self.lib.stop(path, 0), 1)
        self.assert_fails(self.lib.E_ABSENT, 'does not run', self.lib.Machine,
                          path, 0, self.lib.ATTACH)
        with self.lib.Machine(path) as again:
            self.assertEqual(again.instance, 1)
        with self.lib.Machine(path, 1, self.lib.FRESH):
            pass
        self.assertEqual(self.lib.stop(path), 1)
        self.assertEqual(self.lib.stop(path), 0)

    def test_changed(self):
        """Catches a machine that is taken for what the file says by now."""
        path = self.start('ok')
        with self.lib.Machine(path):
            before = self.qemu(path)
        path = self.start('ok', '# other')
        with self.lib.Machine(path) as vm:
            self.assertEqual(vm.instance, 0)
            self.assertNotEqual(self.qemu(path), before)

    def test_killed(self):
        path = self.start('ok')
        for _ in range(3):
            self.kill_holder(path, None)
            with self.lib.Machine(path, flags=self.lib.ATTACH) as vm:
                self.assertEqual(vm.run(b'').result, self.lib.OK)
        self.assertIsNone(self.lib.status(path, 1))

    def test_daemon_killed(self):
        """Catches a QEMU that stays when nobody can end it any more."""
        path = self.start('ok')
        with self.lib.Machine(path) as vm:
            before = self.lib.status(path)
            os.kill(before.daemon, signal.SIGKILL)
            self.wait_until(
                lambda: not Path(f'/proc/{before.qemu}').exists())
            self.assert_fails(self.lib.E_DIED, 'daemon', vm.run, b'')
        self.assertEqual(self.lib.status(path).daemon, 0)
        with self.lib.Machine(path) as vm:
            self.assertEqual(vm.run(b'').result, self.lib.OK)

    def test_idle(self):
        """Catches a machine that is in use and ended, or stays for ever."""
        path = self.start('ok', 'idle = 2')
        with self.lib.Machine(path) as vm:
            time.sleep(5)
            self.assertEqual(vm.run(b'').result, self.lib.OK)
            qemu = self.qemu(path)
        self.wait_until(lambda: not self.lib.status(path).daemon)
        self.assertFalse(Path(f'/proc/{qemu}').exists())

    def test_affinity(self):
        """
        Who is bound to a CPU lends it to QEMU, but for as long as it has the
        machine. Catches a machine that stays bound to the first one's CPU.
        """
        path = self.start('ok', 'affinity = follow')
        cpus = os.sched_getaffinity(0)
        for cpu in sorted(cpus)[:2]:
            os.sched_setaffinity(0, {cpu})
            try:
                with self.lib.Machine(path):
                    qemu = self.qemu(path)
                    self.assertEqual(os.sched_getaffinity(qemu), {cpu})
            finally:
                os.sched_setaffinity(0, cpus)
            self.wait_until(lambda: os.sched_getaffinity(qemu) >= cpus)

    def test_symbols(self):
        """Catches a name of the library's that a program has as well."""
        names = subprocess.check_output(
            ['nm', '-D', '--defined-only', '--format=just-symbols',
             host_programs() / 'libsnapshot-host.so'], text=True).split()
        header = (HOST / 'snapshot-host.h').read_text()
        self.assertEqual(set(names), set(re.findall(
            r'(?m)^[a-z].*?\*?\b(snapshot_vm_\w+)\(', header)))


class Waits(FakeTest):
    """Catches a wait that has no limit, or no reason."""

    def run_apart(self, path, *args):
        def run():
            with self.lib.Machine(path) as vm:
                vm.run(b'', *args)
        return run

    def test_part(self):
        """A QEMU that stops in the middle of a message"""
        processes = []
        for kind in 1, 2, 4:
            for limits in None, self.lib.Limits():
                path = self.start(f'part {kind}',
                                  name=f'part{kind}{bool(limits)}')
                processes.append(self.begin_apart(self.run_apart(path,
                                                                 limits)))
        for process in processes:
            self.check_failed(self.lib.E_STUCK, '10 of the 64 bytes', 15,
                              process)

    def test_pieces(self):
        """Catches a message that is not put together again."""
        with self.lib.Machine(self.start('pieces')) as vm:
            for length in 0, 7:
                self.assertEqual(vm.run(bytes(length)).host_ns, 1000 + length)

    def test_others(self):
        """A QEMU that speaks, but of other things"""
        lib = self.lib
        path = self.start('others', 'timeout = 100')
        self.apart_fails(20, lib.E_STUCK, 'no RESULT', self.run_apart(path))
        for limits in None, lib.Limits():
            path = self.start('flood', name='flood')
            self.apart_fails(20, lib.E_PROTOCOL, 'nobody waits for',
                             self.run_apart(path, limits))
            lib.stop(path)
        with lib.Machine(self.start('one other', name='one')) as vm:
            self.assertEqual(vm.run(b'').result, lib.OK)

    def test_signals(self):
        """Catches a wait that each signal begins anew."""
        path = self.start('stuck', 'timeout = 100')

        def run():
            with self.lib.Machine(path) as vm:
                signal.signal(signal.SIGALRM, lambda *_: None)
                signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
                try:
                    vm.run(b'')
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        self.apart_fails(20, self.lib.E_STUCK, 'not answer', run)

    def test_cancel_early(self):
        """Catches a run that is cancelled before it is asked for, and lasts."""
        program = self.scratch_file('cancel')
        subprocess.run(['gcc', '-O2', '-Wall', '-Werror', '-I', HOST, '-I',
                        HOST.parents[2] / 'include', '-o', program,
                        HERE / 'snapshot-host' / 'cancel.c',
                        *HOST.glob('vm-*.c'), HOST / 'snapshot-host.c'],
                       check=True)
        done = subprocess.run([program, self.start('ok')], text=True,
                              stdout=subprocess.PIPE, timeout=60)
        self.assertEqual(done.stdout, 'hang, cancelled\n')

    def test_frozen(self):
        """QEMU stands still, as under a debugger."""
        path = self.start('ok', 'timeout = 100')
        with self.lib.Machine(path) as vm:
            os.kill(self.qemu(path), signal.SIGSTOP)
            self.assert_fails(self.lib.E_STUCK, 'not answer', vm.run, b'')
            # One that nobody waits for is of no use for another run.
            self.assert_fails(self.lib.E_STUCK, 'restart', vm.run, b'')
            vm.restart()
            self.assertEqual(vm.run(b'').result, self.lib.OK)
            os.kill(self.qemu(path), signal.SIGSTOP)
        self.apart_fails(30, self.lib.E_BUSY, 'no HELLO', self.lib.Machine,
                         path)

    def test_told(self):
        """A start that takes long is told of while it does."""
        path = self.start('mute', 'boot = 7')
        done = subprocess.run([host_programs() / 'snapshot-vm', 'start', path],
                              stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r'(?s)for [5-9] s, the guest is not '
                         r'READY; until 7 s.*says hello.*not get READY in 7 s')

    def test_check(self):
        """What snapshot-vm check says of a guest, before it is fuzzed"""
        file = Path(self.scratch_file('input'))
        file.write_bytes(b'FU')
        for mode, status, words in (
                ('ok', 0, 'coverage: 3 edges, the same'),
                ('none', 1, 'NO COVERAGE: the guest registers no region'),
                ('empty', 1, 'EMPTY COVERAGE: nothing is counted in its 65536'),
                ('flaky', 1, r'UNSTABLE COVERAGE: 1 of 4 .* 75\.0 %'),
                ('fickle', 1, 'UNSTABLE RESULT: crash, then ok'),
                ('crash', 1, 'signal 11'),
                ('magic', 1, 'not a snapshot device'),
                ('version', 1, 'version 2')):
            path = self.start(mode, name=mode)
            done = subprocess.run([host_programs() / 'snapshot-vm', 'check',
                                   path, file], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True)
            self.assertRegex(done.stdout, words)
            self.assertEqual(done.returncode, status, done.stdout)

    def test_slow_start(self):
        """QEMU may take as long to start as its guest, and is told of."""
        path = self.start('slow start', 'boot = 30')
        done = subprocess.run([host_programs() / 'snapshot-vm', 'start', path],
                              stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, 'for [5-9] s, QEMU does not say HELLO; '
                         'until 30 s')

    def test_no_input(self):
        """Catches a file that cannot be read, taken for an empty input."""
        path = self.start('ok')
        programs = host_programs()
        for command in ([programs / 'snapshot-vm', 'run', path, '/'],
                        [programs / 'snapshot-vm', 'run', path, '/nowhere'],
                        [programs / 'afl-snapshot', path, '/nowhere']):
            done = subprocess.run(command, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True)
            self.assertEqual(done.returncode, 1, command)
            self.assertRegex(done.stdout, 'Is a directory|No such file')

    def test_numbers(self):
        """Catches a word that is taken for the number 0."""
        path = self.start('ok')
        for args in (('start', path, 'x'), ('stop', path, '0x'),
                     ('console', path, '1024'), ('start', path, '1.5'),
                     ('stop', path, ''), ('measure', path, '/', 'nan'),
                     ('measure', path, '/', '-1')):
            done = subprocess.run([host_programs() / 'snapshot-vm', *args],
                                  stderr=subprocess.PIPE, text=True)
            self.assertEqual(done.returncode, 2, args)
            self.assertRegex(done.stderr, '"' + args[-1] + '" is no')
        self.assertIsNone(self.lib.status(path))
        self.assert_fails(self.lib.E_USE, 'no instance 1024', self.lib.Machine,
                          path, 1024)


class Handles(FakeTest):
    """Catches a program that a wrong call ends."""

    def check_useless(self, vm, code, *words):
        """All that needs a machine says that there is none."""
        for call in (lambda: vm.input_size, lambda: vm.begin(b'x'),
                     lambda: vm.run(b''), vm.fileno):
            self.assert_fails(code, words[0], call)
        vm.cancel()

    def test_closed(self):
        path = self.start('ok')

        def use():
            vm = self.lib.Machine(path)
            handle = vm._vm
            vm.close()
            vm.close()
            self.check_useless(vm, self.lib.E_USE, 'was closed')
            for call in (lambda: vm.instance, lambda: vm.directory,
                         lambda: vm.coverage_size, vm.limits, vm.end,
                         vm.restart):
                self.assert_fails(self.lib.E_USE, 'was closed', call)
            # The same in C, also when others were opened since
            for _ in range(3):
                self.lib.Machine(path).close()
            vm._vm = handle
            self.check_useless(vm, self.lib.E_USE, 'was closed')
            self.assert_fails(self.lib.E_USE, 'was closed', vm.end)
            self.assert_fails(self.lib.E_USE, 'was closed', vm.restart)
            vm.close()
        self.apart(30, use)

    def test_restart_failed(self):
        """Nothing is connected then, or mapped."""
        program = Path(self.scratch_file('program'))
        fake = HERE / 'snapshot-host' / 'fake-qemu.py'
        program.symlink_to(fake)
        path = self.describe(f'qemu = {program}', 'channel = 256K',
                             '-fake ok')

        def use():
            with self.lib.Machine(path) as vm:
                program.unlink()
                self.assert_fails(self.lib.E_START, 'cannot start', vm.restart)
                self.check_useless(vm, self.lib.E_DIED, 'restart')
                self.assert_fails(self.lib.E_USE, 'no run', vm.end)
                self.assertEqual(vm.coverage_size, 0)
                program.symlink_to(fake)
                vm.restart()
                self.assertEqual(vm.run(b'FUZ!C').result, self.lib.CRASH)
        self.apart(30, use)

    def test_turns(self):
        """Catches a run that is waited for, but was not begun."""
        path = self.start('ok')

        def use():
            with self.lib.Machine(path) as vm:
                self.assert_fails(self.lib.E_USE, 'no run', vm.end)
                vm.begin(b'')
                self.assert_fails(self.lib.E_USE, 'under way', vm.begin, b'')
                self.assertEqual(vm.end().result, self.lib.OK)
                self.assert_fails(self.lib.E_USE, 'no run', vm.end)
        self.apart(10, use)

    def where(self, vm):
        """The address of the next input"""
        return self.lib._lib.snapshot_vm_input(
            vm._vm, ctypes.byref(ctypes.c_size_t()))

    def test_moved(self):
        """
        Catches an input that is written to where the guest read it from before
        it was reset.
        """
        path = self.start('moved')

        def use():
            with self.lib.Machine(path) as vm:
                where = self.where(vm)
                self.assert_fails(self.lib.E_ENDED, 'reset', vm.run, b'FUZ')
                run = vm.run(b'FUZ!C')
                self.assertEqual(run.result, self.lib.CRASH)
                self.assertEqual(self.where(vm), where + 65536)
        self.apart(10, use)

        def use_old():
            """In C, who does not ask where it is does not run another's."""
            with self.lib.Machine(path) as vm:
                self.assert_fails(self.lib.E_ENDED, 'reset', vm.run, b'FUZ')
                lib, error = self.lib._lib, -self.lib.E_ENDED
                self.assertEqual(lib.snapshot_vm_begin(vm._vm, 3, None), error)
                self.assertEqual(vm.run(b'FUZ!C').result, self.lib.CRASH)
        self.lib.stop(path)
        self.apart(10, use_old)

    def test_early(self):
        """
        The guest is reset, and READY again, before it is asked for a run:
        that run begins, though its host was told of the reset. Catches the
        next one, for which the guest is not READY, waiting for ever.
        """
        for mode in 'early', 'early and short':
            path = self.start(mode, 'boot = 5', name=mode[-5:])

            def use():
                with self.lib.Machine(path) as vm:
                    self.assert_fails(self.lib.E_ENDED, 'reset', vm.run, b'FU')
                    for data in b'', b'FUZ!', b'FUZ':
                        self.assertEqual(vm.run(data).host_ns,
                                         1000 + len(data))
            self.apart(20, use)

        path = self.start('early and mute', name='mute')

        def use_mute():
            with self.lib.Machine(path) as vm:
                self.assert_fails(self.lib.E_ENDED, 'reset', vm.run, b'FU')
                vm.run(b'', self.lib.Limits())
        self.apart_fails(20, self.lib.E_STUCK, 'run 1 was told to end',
                         use_mute)


class Dead(FakeTest):
    """Catches a machine that is waited for, when it has ended in any state."""

    def kill(self, path, name='qemu'):
        status = self.lib.status(path)
        os.kill(getattr(status, name), signal.SIGKILL)
        # What the daemon's end does to QEMU takes a moment.
        self.wait_until(lambda: name == 'qemu' or
                        not Path(f'/proc/{status.qemu}').exists())

    def test_unused(self):
        """Found dead, it is started anew: the daemon may not know yet."""
        path = self.start('ok')
        self.lib.Machine(path).close()
        for i in range(30):
            before = self.qemu(path)
            self.kill(path, ('qemu', 'daemon')[i % 3 == 2])

            def use():
                with self.lib.Machine(path) as vm:
                    self.assertEqual(vm.run(b'').result, self.lib.OK)
            self.apart(15, use)
            self.assertNotIn(self.qemu(path), (0, before))
        # Who does not want it started is told.
        self.kill(path)
        self.apart_fails(15, self.lib.E_ABSENT, 'does not run',
                         self.lib.Machine, path, -1, self.lib.ATTACH)

    def test_used(self):
        for mode in 'ok', 'stuck', 'ended', 'ended for ever':
            for name in 'qemu', 'daemon':
                path = self.start(mode, 'boot = 60', name=mode.split()[-1])
                self.lib.stop(path)

                def use():
                    with self.lib.Machine(path) as vm:
                        if mode == 'stuck':
                            vm.begin(b'', self.lib.Limits())
                        elif mode != 'ok':
                            self.assert_fails(self.lib.E_ENDED, 'reset',
                                              vm.run, b'')
                        self.kill(path, name)
                        call = (vm.end,) if mode == 'stuck' else (vm.run, b'')
                        self.assert_fails(self.lib.E_DIED,
                                          'signal 9|was killed', *call)
                        self.assert_fails(self.lib.E_DIED, 'restart', vm.run,
                                          b'')
                        vm.restart()
                        self.assertNotEqual(self.qemu(path), 0)
                self.apart(15, use)

    def test_starting(self):
        path = self.start('mute', 'boot = 60')
        for name in 'qemu', 'daemon':
            timer = threading.Timer(2, self.kill, (path, name))
            timer.start()
            self.apart_fails(15, self.lib.E_START, 'signal 9|was killed',
                             self.lib.Machine, path)
            timer.join()

    def test_ending(self):
        """
        Nobody uses it, and it is ended; whoever comes before it has ended gets
        another. Catches a machine that ends in the hands of its user.
        """
        path = self.start('slow end', 'idle = 1')
        with self.lib.Machine(path) as vm:
            before, directory = self.qemu(path), vm.directory
        self.wait_until(lambda: 'is ending' in self.lib.console(directory))

        def use():
            with self.lib.Machine(path) as vm:
                for _ in range(3):
                    self.assertEqual(vm.run(b'').result, self.lib.OK)
                    time.sleep(1)
        self.apart(20, use)
        self.assertNotEqual(self.qemu(path), before)

    def test_short_use(self):
        """Catches a machine that is ended between two that use it briefly."""
        path = self.start('ok', 'idle = 3')
        self.lib.Machine(path).close()
        before = self.qemu(path)
        for _ in range(60):
            time.sleep(0.1)
            self.lib.Machine(path).close()
        self.assertEqual(self.qemu(path), before)


class Paths(FakeTest):
    """Catches a path that is cut, read as two, or followed elsewhere."""

    def test_lengths(self):
        path = self.start('ok')
        works = set()
        for length in range(60, 108):
            directory = self.directory + '/'
            directory += 'd' * (length - len(directory))
            os.environ['SNAPSHOT_VM_DIR'] = directory
            for instance in 0, 1023:
                try:
                    with self.lib.Machine(path, instance) as vm:
                        self.assertEqual(vm.run(b'').result, self.lib.OK)
                        self.assertTrue((vm.directory / 'control').exists())
                    works.add(length)
                except self.lib.Failure as failure:
                    self.assertEqual(failure.code, self.lib.E_SYSTEM)
                    self.assertRegex(str(failure), 'too long for a socket')
            if length in works:
                self.lib.stop(path)
        self.assertEqual(works, set(range(60, max(works) + 1)))

    def test_names(self):
        """What a comma, a space, and a relative path mean to QEMU"""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)
        os.mkdir('a,b=c')
        for directory in 'relative', 'a,b=c/d,,e', '.':
            os.environ['SNAPSHOT_VM_DIR'] = directory
            for name in 'vm', 'v,m', ',id=x', 'a-very-long-n,ame-it-is':
                path = self.start('ok', '-x file=${directory}/x', name=name)
                with self.lib.Machine(path) as vm:
                    self.assertEqual(vm.run(b'FUZ!C').result, self.lib.CRASH)
                    self.assertTrue(vm.directory.is_absolute())
                    self.assertEqual(
                        vm.directory.parents[1],
                        Path(os.path.normpath(self.directory)) / directory)
                    args = Path(f'/proc/{self.qemu(path)}/cmdline').read_text()
                    escaped = os.fsdecode(
                        self.lib._lib.snapshot_vm_directory(
                            vm._vm)).replace(',', ',,')
                    for file in 'control', 'qmp', 'channel', 'x':
                        self.assertRegex(args, '(path|file)=' + re.escape(
                            f'{escaped}/{file}') + '\0')
                self.lib.stop(path)

    def test_long_option(self):
        """Catches an option of the device's that is cut."""
        path = self.start('ok', 'device = id=' + 500 * 'x' + ',ram=dirty')
        with self.lib.Machine(path):
            args = Path(f'/proc/{self.qemu(path)}/cmdline').read_text()
            self.assertIn(500 * 'x' + ',ram=dirty\0', args)

    def test_links(self):
        """What others might have put there"""
        path = self.start('ok')
        with self.lib.Machine(path) as vm:
            directory = vm.directory
        self.lib.stop(path)
        victim = Path(self.scratch_file('victim'))
        for name in 'lock', 'daemon', 'state', 'channel', 'control', 'qmp':
            for kind in 'link', 'fifo':
                victim.write_text('precious')
                (directory / name).unlink(missing_ok=True)
                if kind == 'link':
                    (directory / name).symlink_to(victim)
                else:
                    os.mkfifo(directory / name)
                if name in ('lock', 'daemon', 'state'):
                    self.apart_fails(15, self.lib.E_SYSTEM, f'/{name}: ',
                                     self.lib.Machine, path, 0)
                    (directory / name).unlink()
                else:
                    self.apart(15, lambda: self.lib.Machine(path, 0).run(b''))
                    self.lib.stop(path)
                self.assertEqual(victim.read_text(), 'precious')

    def test_gap(self):
        """Catches a machine that runs, but is not found behind a number."""
        path = self.start('ok')
        self.lib.Machine(path, 2).close()
        with self.lib.Machine(path) as vm:
            self.assertEqual(vm.instance, 2)
            with self.lib.Machine(path) as other:
                self.assertEqual(other.instance, 0)

    def test_others_runtime(self):
        """What sudo leaves: a directory for another user's files"""
        if os.geteuid():
            self.skipTest('only root can give a directory away')
        runtime = Path(self.directory, 'r')
        runtime.mkdir()
        path = self.start('ok')
        del os.environ['SNAPSHOT_VM_DIR']
        before = os.environ.get('XDG_RUNTIME_DIR')
        os.environ['XDG_RUNTIME_DIR'] = str(runtime)
        try:
            for owner, inside in (0, True), (12345, False):
                os.chown(runtime, owner, owner)
                with self.lib.Machine(path) as vm:
                    self.assertEqual(runtime in vm.directory.parents, inside)
                self.lib.stop(path)
        finally:
            del os.environ['XDG_RUNTIME_DIR']
            if before is not None:
                os.environ['XDG_RUNTIME_DIR'] = before

    def test_full(self):
        """
        The tmpfs is full. Catches memory that is written to, and not there:
        SIGBUS.
        """
        script = """
import os, sys
sys.path.insert(0, os.environ['HOST'])
import snapshot_host as lib
try:
    with lib.Machine(sys.argv[1]) as vm:
        vm.run(bytes(vm.input_size))
    lib.stop(sys.argv[1])
except lib.Failure as failure:
    print(failure.code, failure)
"""
        path = self.start('ok', 'channel = 2M')
        for size in '64k', '300k', '4m':
            done = subprocess.run(
                ['unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=' +
                 size + ',mode=700 none "$SNAPSHOT_VM_DIR" || exit 77; '
                 'exec "$@"', 'sh', sys.executable, '-c', script, path],
                env={**os.environ, 'HOST': str(HOST)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
            if done.returncode == 77 or 'unshare' in done.stdout:
                self.skipTest(f'no tmpfs can be mounted: {done.stdout}')
            self.assertEqual(done.returncode, 0, done.stdout)
            self.assertRegex(done.stdout, '^$' if size == '4m' else
                             f'^{self.lib.E_SYSTEM} .*No space left')


if __name__ == '__main__':
    MachinesTest.main()

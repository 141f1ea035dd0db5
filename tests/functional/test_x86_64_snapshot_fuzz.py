#!/usr/bin/env python3
#
# Functional test of contrib/snapshot/host, the library through which a program
# on the host has a guest of the snapshot device run inputs
#
# SPDX-License-Identifier: GPL-2.0-or-later

import multiprocessing
import os
from pathlib import Path
import random
import signal
import subprocess
import time

from snapshot.machines import MachinesTest, guest, host_programs, library

HERE = Path(__file__).resolve().parent


def hold(path, data, pipe):
    """Of a process of its own: begin a run, and be killed"""
    vm = library().Machine(path)
    if data is not None:
        vm.begin(data)
    pipe.send(vm.instance)
    time.sleep(600)


class HostTest(MachinesTest):

    def assert_fails(self, code, words, call, *args):
        with self.assertRaises(self.lib.Failure) as caught:
            call(*args)
        self.assertEqual(caught.exception.code, code, caught.exception)
        self.assertRegex(str(caught.exception), words)

    def wait_until(self, condition, seconds=15):
        end = time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), end, 'it never was so')
            time.sleep(0.01)

    def qemu(self, path, instance=0):
        return self.lib.status(path, instance).qemu

    def kill_holder(self, path, data):
        """A program that has a machine is killed."""
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context('spawn').Process(
            target=hold, args=(path, data, there))
        process.start()
        instance = here.recv()
        self.assertEqual(self.lib.status(path, instance).user, process.pid)
        process.kill()
        process.join()
        self.assertEqual(self.lib.status(path, instance).user, 0)


class Fake(HostTest):
    """
    A program that is no QEMU, but does as the protocol's page says, or does
    not. Catches an error that is not told, or waited for for ever.
    """

    def start(self, mode, *lines, name='vm'):
        fake = HERE / 'snapshot-host' / 'fake-qemu.py'
        return self.describe(f'qemu = {fake}', 'channel = 256K', 'boot = 20',
                             *lines, f'-fake {mode}', name=name)

    def test_refused(self):
        lib = self.lib
        for mode, code, words in (
                ('version', lib.E_PROTOCOL, 'version 2 .* version 1'),
                ('magic', lib.E_PROTOCOL, 'not a snapshot device'),
                ('outside', lib.E_PROTOCOL, 'outside the channel'),
                ('beyond', lib.E_PROTOCOL, 'outside the channel'),
                ('short', lib.E_PROTOCOL, '131072 bytes, not 262144'),
                ('close', lib.E_PROTOCOL, 'closed the connection'),
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


class Guest(HostTest):
    """A guest that processes what snapshot/fuzz-target.h does"""

    MAP = 65536
    LETTERS = b'CAHWPTROSI'

    def expected_map(self, data):
        """As EDGE() counts in snapshot/fuzz-target.h and fuzz.c"""
        edges = [0x101]
        for byte, edge in zip(b'FUZ!', (0x213, 0x345, 0x467, 0x589)):
            if len(data) < len(edges) or data[len(edges) - 1] != byte:
                break
            edges.append(edge)
        if len(edges) == 5 and data[4:] and data[4] in self.LETTERS:
            edges.append(0x800 + 2 * data[4])
        if len(edges) == 1 and len(data) > 1 and data[0] & 1:
            edges.append(0x6ab)
        counts, previous = {}, 0
        for edge in edges:
            i = (edge ^ previous) % self.MAP
            counts[i] = counts.get(i, 0) + 1
            previous = edge >> 1
        return counts

    def check_run(self, vm, data, result=None, cause=None, text='',
                  limits=None):
        run = vm.run(data, limits)
        self.assertEqual(run.result, self.lib.OK if result is None else result,
                         (data[:8], run.text))
        self.assertEqual(run.cause, cause or self.lib.GUEST)
        self.assertEqual(run.text, text)
        self.assertEqual(len(run.coverage), self.MAP)
        self.assertEqual({i: n for i, n in enumerate(run.coverage) if n},
                         self.expected_map(data), data[:8])
        return run



class Bare(Guest):
    """The bare-metal guest of snapshot/fuzz.c"""

    def ends(self):
        """Each way in which a run can end: letter, result, cause, text"""
        lib = self.lib
        return ((b'C', lib.CRASH, lib.GUEST, 'the planted crash'),
                (b'A', lib.SANITIZER, lib.GUEST, 'ERROR: a planted report'),
                (b'P', lib.CRASH, lib.PANIC, ''),
                (b'T', lib.CRASH, lib.RESET, ''),
                (b'R', lib.CRASH, lib.RESET, ''),
                (b'O', lib.CRASH, lib.SHUTDOWN, ''),
                (b'H', lib.HANG, lib.HOST_TIME, ''),
                (b'W', lib.HANG, lib.HOST_TIME, ''),
                (b'S', lib.STOP, lib.GUEST, 'the guest has seen enough'),
                (b'I', lib.INVALID, lib.GUEST, 'not possible here'))

    def check_results(self, machine, *lines):
        """
        Catches an end that is taken for another, is not undone, or whose
        coverage is not that of its run.
        """
        path = self.describe_guest('timeout = 300', *lines, machine=machine)
        with self.lib.Machine(path) as vm:
            self.check_run(vm, b'')
            for letter, *end in self.ends():
                self.check_run(vm, b'FUZ!' + letter, *end)
                self.check_run(vm, b'FUZ?' + letter)
            qemu = self.qemu(path)
        # The machine that all this has happened to is as good as new.
        with self.lib.Machine(path, flags=self.lib.ATTACH) as vm:
            self.assertEqual(self.qemu(path), qemu)
            self.check_run(vm, b'FUZ!x')

    def test_results_pc(self):
        self.check_results('pc', 'device = ram=dirty')

    def test_results_q35(self):
        self.check_results('q35', 'device = ram=remap')

    def test_no_reboot(self):
        """What the user wants to happen with a panic must not happen here."""
        self.check_results('q35', '-no-reboot', '-no-shutdown',
                           '-action panic=exit-failure')

    def test_random(self):
        """Catches an input, or a map, that is another run's."""
        rng = random.Random(1)
        with self.lib.Machine(self.describe_guest()) as vm:
            for _ in range(3000):
                data = b'FUZ!'[:rng.randrange(5)] + \
                    rng.randbytes(rng.choice((0, 1, 2, 100, 5000)))
                if data[:4] == b'FUZ!' and data[4:] and data[4] in self.LETTERS:
                    continue
                self.check_run(vm, data)

    def test_lengths(self):
        path = self.describe_guest(options='size=1000')
        with self.lib.Machine(path) as vm:
            self.assertEqual(vm.input_size, 1000)
            self.check_run(vm, bytes(1000))
            self.assert_fails(self.lib.E_LENGTH, '1001 bytes.*1000', vm.run,
                              bytes(1001))
            self.check_run(vm, b'FU')

    def test_limits(self):
        """Catches a limit of the wrong clock, and a cancel that is lost."""
        lib = self.lib
        path = self.describe_guest('timeout = 0', 'guest-timeout = 50')
        with lib.Machine(path) as vm:
            run = self.check_run(vm, b'FUZ!H', lib.HANG, lib.GUEST_TIME)
            self.assertGreaterEqual(run.guest_ns, 50e6)
            run = self.check_run(vm, b'FUZ!H', lib.HANG, lib.HOST_TIME,
                                 limits=lib.Limits(host_ns=70000000))
            self.assertGreaterEqual(run.host_ns, 70e6)
            self.assertLess(run.host_ns, 5e9)
            for wait in (0, 0, 0.001, 0.2):
                vm.begin(b'FUZ!H', lib.Limits())
                time.sleep(wait)
                vm.cancel()
                run = vm.end()
                self.assertEqual((run.result, run.cause),
                                 (lib.HANG, lib.CANCELLED))
                # One that comes too late has no effect.
                vm.cancel()
                self.check_run(vm, b'FUZ')

    def test_host_killed(self):
        """Catches a run that goes on for ever, with its host gone."""
        path = self.describe_guest('timeout = 0')
        with self.lib.Machine(path):
            qemu = self.qemu(path)
        for data in (None, b'', b'FUZ!H', b'FUZ!W'):
            self.kill_holder(path, data)
            with self.lib.Machine(path, flags=self.lib.ATTACH) as vm:
                self.check_run(vm, b'FUZ!x')
                self.assertEqual(self.qemu(path), qemu)

    def test_qemu_killed(self):
        path = self.describe_guest()
        with self.lib.Machine(path) as vm:
            vm.begin(b'FUZ!H', self.lib.Limits())
            os.kill(self.qemu(path), signal.SIGKILL)
            self.assert_fails(self.lib.E_DIED, 'signal 9', vm.end)
            vm.restart()
            self.check_run(vm, b'FUZ!x')

    def test_reset(self):
        """The user resets the machine, which gets READY again."""
        path = self.describe_guest()
        with self.lib.Machine(path) as vm:
            self.check_run(vm, b'')
            with self.monitor(vm) as monitor:
                monitor.cmd('system_reset')
                self.assert_fails(self.lib.E_ENDED, 'reset', vm.run, b'')
                self.check_run(vm, b'FUZ!x')

    def monitor(self, vm):
        from qemu.qmp.legacy import QEMUMonitorProtocol
        monitor = QEMUMonitorProtocol(str(vm.directory / 'qmp'))
        monitor.connect()
        return monitor

    def test_coverage_tcg(self):
        """Catches a map of QEMU's that is another run's, or the guest's."""
        path = self.describe_guest('coverage = tcg,mode=kernel', 'map = 16K')
        with self.lib.Machine(path) as vm:
            self.assertEqual(vm.coverage_size, 16384)
            maps = {}
            for data in (b'', b'FU', b'FUZ!C', b'FUZ!H', b'FUZ!') * 5:
                run = vm.run(data, self.lib.Limits(guest_ns=20000000))
                self.assertEqual(len(run.coverage), 16384)
                seen = {i for i, n in enumerate(run.coverage) if n}
                self.assertGreater(len(seen), 5)
                self.assertEqual(maps.setdefault(data, seen), seen, data)
            self.assertEqual(len(set(map(frozenset, maps.values()))), 5)

    def test_mute(self):
        path = self.describe_guest('boot = 3', options='mute=1')
        self.assert_fails(self.lib.E_NOT_READY,
                          r'(?s)READY in 3 s.*the guest is there',
                          self.lib.Machine, path)

    def test_wrong_option(self):
        path = self.describe_guest('-device nonesuch')
        self.assert_fails(self.lib.E_START,
                          r"(?s)status 1.*'nonesuch' is not a valid",
                          self.lib.Machine, path)

    def test_programs(self):
        """snapshot-vm, as the README tells"""
        host = host_programs()
        path = self.describe_guest()
        files = []
        for data in (b'FUZ?', b'FUZ!C', b'FUZ!P'):
            files.append(self.scratch_file(f'input{len(files)}'))
            Path(files[-1]).write_bytes(data)

        def run(*args, status=0):
            done = subprocess.run([host / 'snapshot-vm', *args], text=True,
                                  stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL)
            self.assertEqual(done.returncode, status)
            return done.stdout

        self.assertRegex(run('start', path), 'instance 0 is READY')
        self.assertRegex(run('status', path), '^0: .* nobody has it')
        output = run('run', path, *files).splitlines()
        self.assertRegex(output[0], r'input0: ok .* 4 edges$')
        self.assertRegex(output[1], r'input1: crash .*: the planted crash$')
        self.assertRegex(output[2], r'input2: crash \(panic\)')
        self.assertIn('Kernel panic', run('console', path))
        self.assertRegex(run('measure', path, files[0], '1'), r'^[1-9]\d+ runs')
        self.assertEqual(run('stop', path), '1 ended\n')
        run('nonsense', path, status=2)

    def test_speed(self):
        """
        Tells how fast the loop is beside the guest's own restores. Catches a
        loop that waits for something.
        """
        path = self.describe_guest()
        with self.lib.Machine(path):
            pass
        seed = self.scratch_file('seed')
        Path(seed).write_bytes(b'FUx')
        # As AFL++ does it, all are on one CPU.
        command = ['taskset', '-c', str(min(os.sched_getaffinity(0))),
                   host_programs() / 'snapshot-vm', 'measure', path, seed, '3']
        loop = int(subprocess.check_output(command, text=True).split()[0])
        self.lib.stop(path)
        own = self.own_restores()
        print(f'# {loop} runs/s, {own} restores/s, {loop / own:.2f}')
        self.assertGreater(loop, own / 20)

    def own_restores(self):
        """Of a guest that writes to as many pages"""
        console = Path(self.scratch_file('marks'))
        self.vm.add_args('-nodefaults', '-machine', 'q35', '-accel', 'tcg',
                         '-m', '32M', '-rtc', 'clock=vm', '-kernel',
                         str(guest()), '-append',
                         'case=bench pages=4 mark=100', '-chardev',
                         f'file,id=debug,path={console}', '-device',
                         'isa-debugcon,iobase=0xe9,chardev=debug', '-device',
                         'snapshot')
        self.vm.launch()
        self.wait_until(lambda: console.exists() and console.stat().st_size)
        start, before = time.monotonic(), console.stat().st_size
        time.sleep(3)
        marks = console.stat().st_size - before
        elapsed = time.monotonic() - start
        self.vm.shutdown()
        return int(marks * 100 / elapsed)


class Linux(Guest):
    """
    snapshot-linux/fuzz.c, which has children process the inputs. Catches
    buffers that are elsewhere when a program has forked, and a kernel's end
    that is not told or not undone.
    """

    LETTERS = b''

    def test_linux(self):
        linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX') or
                     HERE.parents[1] / 'build' / 'linux')
        if not (linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {linux}: run scripts/linux-guest')
        path = self.describe(
            f'qemu = {self.qemu_bin}', 'boot = 300', 'timeout = 1000',
            '-accel tcg', '-m 256', f'-kernel {linux}/vmlinuz',
            f'-initrd {linux}/initramfs', '-device pvpanic', '-append '
            'console=ttyS0 panic=-1 no_timer_check quiet snapshot.run=fuzz')
        lib = self.lib
        with lib.Machine(path) as vm:
            self.assertEqual(vm.input_size, 5000)
            for data in (b'', b'FUZ', b'FU' + bytes(4998), b'FUZ!x') * 5:
                self.check_run(vm, data)
            self.check_run(vm, b'FUZ!C', lib.CRASH, lib.GUEST, 'signal 6')
            self.check_run(vm, b'FUZ!H', lib.HANG, lib.HOST_TIME)
            # No driver of pvpanic's is there: panic=-1 resets.
            run = vm.run(b'FUZ!P', lib.Limits())
            self.assertEqual(run.result, lib.CRASH)
            self.assertIn(run.cause, (lib.PANIC, lib.RESET))
            self.wait_until(
                lambda: 'Kernel panic' in lib.console(vm.directory))
            self.check_run(vm, b'FUZ!x')


if __name__ == '__main__':
    MachinesTest.main()

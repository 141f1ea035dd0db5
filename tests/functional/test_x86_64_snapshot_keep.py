#!/usr/bin/env python3
#
# Functional test of contrib/snapshot/host: machines that are kept in a file
#
# SPDX-License-Identifier: GPL-2.0-or-later

from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

from qemu.qmp import ConnectError

from snapshot.hosts import HostTest, monitor
from snapshot.machines import HOST, guest, host_programs

FULL = bool(os.getenv('FULL'))
WORKERS = 100 if FULL else 8
RUNS = 1000

# A process that has an instance: its name, the description, instance, runs
WORKER = '''
import sys
sys.path.insert(0, sys.argv[1])
import snapshot_host as lib
with lib.Machine(sys.argv[2], int(sys.argv[3]), lib.ATTACH) as vm:
    print('has it', flush=True)
    for i in range(int(sys.argv[4])):
        data = (b'', b'FUZ?', b'FU%d' % i, b'FUZ!C')[i % 4]
        run = vm.run(data)
        assert run.result == (lib.CRASH if i % 4 == 3 else lib.OK), (i, data)
'''


class KeepTest(HostTest):

    def setUp(self):
        super().setUp()
        self.told = []
        self.lib.on_wait(self.told.append)
        self.folder = Path(self.scratch_file('keep'))
        self.folder.mkdir()
        self.file = self.folder / 'the, machine.snap'
        self.key = Path(f'{self.file}.key')

    def tearDown(self):
        self.lib.on_wait(lambda text: None)
        super().tearDown()

    def keep(self, *lines, file=None, name='vm', **kwargs):
        return self.describe_guest(f'keep = {file or self.file}', *lines,
                                   name=name, **kwargs)

    def begin(self, path, began, words=None, instance=-1, stop=True):
        """Start, and see how it began, what was told, and that it runs."""
        self.told.clear()
        with self.lib.Machine(path, instance) as vm:
            self.assertEqual((vm.began, '\n'.join(self.told)),
                             (began, '\n'.join(self.told)))
            self.check_runs(vm)
        if words:
            self.assertRegex('\n'.join(self.told), words)
        else:
            self.assertEqual(self.told, [])
        if stop:
            self.lib.stop(path)

    def check_runs(self, vm):
        lib = self.lib
        crash = vm.run(b'FUZ!C')
        self.assertEqual((crash.result, crash.text),
                         (lib.CRASH, 'the planted crash'))
        self.assertEqual(vm.run(b'FUZ?').result, lib.OK)

    def start(self, *args):
        done = subprocess.run([host_programs() / 'snapshot-vm', 'start',
                               *args], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout


class Keep(KeepTest):

    def test_once(self):
        """
        Catches a guest that boots again, a run that differs in a machine from
        the file, and a monitor that the user cannot have.
        """
        lib = self.lib
        path = self.keep()
        with lib.Machine(path) as vm:
            self.assertEqual(vm.began, lib.KEPT, self.told)
            qmp = monitor(vm.directory)
            self.assertEqual(qmp.cmd('query-jobs'), [])
            qmp.close()
            before = [vm.run(data) for data in (b'FUZ!C', b'FU', b'FUZ!P')]
        self.assertEqual(self.told, [])
        # Another instance, and the same anew
        for instance in 1, 0:
            with lib.Machine(path, instance, lib.FRESH) as vm:
                self.assertEqual(vm.began, lib.LOADED)
                # A boot writes to the console.
                self.assertEqual(lib.console(vm.directory), '')
                for run, data in zip(before, (b'FUZ!C', b'FU', b'FUZ!P')):
                    now = vm.run(data)
                    self.assertEqual(
                        (now.result, now.cause, now.text, now.coverage),
                        (run.result, run.cause, run.text, run.coverage))
            with lib.Machine(path, instance) as vm:
                self.assertEqual(vm.began, lib.RAN)
                vm.restart()
                self.assertEqual(vm.began, lib.LOADED)
        self.assertEqual(self.told, [])
        self.assertEqual(sorted(os.listdir(self.folder)),
                         [self.file.name, self.key.name])

    def test_one_thread(self):
        """
        Catches: vCPUs that share a thread, and never see the first run, as it
        waits for the machine's start and for nothing else.
        """
        for i, (accel, *lines) in enumerate((
                ('tcg,thread=single',), ('tcg,thread=single', '-smp 2'),
                ('tcg', '-icount shift=3,sleep=off'), ('tcg', '-smp 2'))):
            with self.subTest((accel, *lines)):
                path = self.keep(*lines, name=f'vm{i}',
                                 file=self.folder / f'{i}.snap')
                path.write_text(path.read_text().replace('-accel tcg',
                                                         f'-accel {accel}'))
                self.begin(path, self.lib.KEPT)
                self.begin(path, self.lib.LOADED)

    def test_words(self):
        """What snapshot-vm start says, and that the rest works as ever"""
        path = self.keep('idle = 2', '-serial none')
        name = re.escape(str(self.file))
        self.assertRegex(self.start(path), r'instance 0 is READY after [\d.]+ '
                         f's, booted, and kept in {name}: inputs')
        self.assertRegex(self.start(path), r'READY after [\d.]+ s: inputs')
        self.wait_until(lambda: not self.lib.status(path).daemon)
        self.assertRegex(self.start(path), rf's, from {name} \(its boot took '
                         r'[\d.]+ s\): inputs')
        file = self.folder / 'input'
        file.write_bytes(b'FU')
        for command in 'check', 'replay':
            log = ('--log', self.folder / 'log') if command == 'replay' else ()
            subprocess.run([host_programs() / 'snapshot-vm', command, path,
                            file, *log], check=True)
        self.assertIn('result: ok', (self.folder / 'log').read_text())

    def test_changed(self):
        """
        Catches: an old file that is used for a changed machine. QEMU cannot
        tell any of these but by what the library has written down.
        """
        kernel = self.folder / 'a kernel,with=names'
        shutil.copy(guest(), kernel)
        other = self.folder / 'other'
        other.write_bytes(bytes(1024))
        block = self.folder / 'block'
        block.write_bytes(bytes(1 << 20))
        wrapper = self.folder / 'qemu'
        wrapper.write_text(f'#!/bin/sh\nexec {self.qemu_bin} "$@"\n')
        wrapper.chmod(0o755)
        lines = ['-device loader,addr=0x1800000,file=other',
                 '-blockdev {"driver": "file", "node-name": "n", "read-only": '
                 f'true, "filename": "{block}"}}',
                 f'-kernel {kernel}', f'-initrd {other} quiet',
                 f'-serial file:{self.folder}/output',
                 f'-debugcon file:{self.folder}/output']

        def describe(*more):
            # The last -kernel counts, the last qemu as well.
            path = self.keep(*more)
            text = path.read_text().replace(f'-kernel {guest()}\n', '')
            path = self.folder / 'vm'
            path.write_text(text + '\n'.join([*lines, f'qemu = {wrapper}\n']))
            self.descriptions.add(path)
            return path
        path = describe()
        self.begin(path, self.lib.KEPT)
        self.begin(path, self.lib.LOADED)
        for file in kernel, other, block, wrapper:
            with self.subTest(file.name):
                os.utime(file, ns=(0, time.time_ns()))
                self.begin(path, self.lib.KEPT,
                           f'boots: {file} has changed')
                self.begin(path, self.lib.LOADED)
        # The time is as it was, but not the size.
        stat = os.stat(other)
        other.write_bytes(bytes(2048))
        os.utime(other, ns=(0, stat.st_mtime_ns))
        self.begin(path, self.lib.KEPT, 'other has changed')
        path = describe('timeout = 1001')
        self.begin(path, self.lib.KEPT, 'the description has changed')
        self.begin(path, self.lib.LOADED)

    def test_file(self):
        """
        Catches a file that is taken for another: what is in it is QEMU's to
        find out, which one it is the library's.
        """
        path = self.keep()
        self.begin(path, self.lib.KEPT)
        key = self.key.read_text()
        data = self.file.read_bytes()
        kept = self.lib.KEPT

        def replace(new, mode=0o400):
            self.file.unlink()
            self.file.write_bytes(new)
            self.file.chmod(mode)

        def adopt():
            # As if it were the one that was written
            st = os.stat(self.file)
            lines = key.split('\n')
            lines[1] = f'{st.st_dev:x} {st.st_ino} {st.st_size} ' \
                f'{st.st_mtime_ns // 10**9}.{st.st_mtime_ns % 10**9:09}'
            self.key.write_text('\n'.join(lines))

        replace(data)
        self.begin(path, kept, 'not the one that .*key tells of')
        for bad, words in (
                (lambda key: key[:30], 'tells of'),
                (lambda key: '', 'does not tell what it is of'),
                (lambda key: key.replace('keep 1', 'keep 2'), 'does not tell'),
                (lambda key: re.sub(r'\n\d+\n', r'\n?\n', key), 'is damaged'),
                (lambda key: key[:-10], 'has changed')):
            self.key.write_text(bad(self.key.read_text()))
            self.begin(path, kept, words)
        key = self.key.read_text()
        self.key.unlink()
        self.begin(path, kept, 'does not tell what it is of')
        self.file.unlink()
        self.begin(path, kept)
        replace(data, 0o666)
        adopt()
        self.begin(path, kept, 'this user alone')
        # QEMU's words, and the machine all the same
        replace(data.replace(b'"ready"', b'"raedy"'))
        adopt()
        self.begin(path, kept, r'(?s)does not begin from .*status 1.*damaged')
        self.begin(path, self.lib.LOADED)

    def test_other_machine(self):
        """QEMU refuses a file: that is told, and another one written."""
        first = self.keep()
        self.begin(first, self.lib.KEPT)
        key = self.key.read_text().split('\n')
        # As if the number of CPUs were no part of the description
        second = self.keep('-smp 2', name='second')
        self.begin(second, self.lib.KEPT, 'the description has changed')
        other = self.key.read_text().split('\n')
        other[3] = key[3]
        self.key.write_text('\n'.join(other))
        self.begin(first, self.lib.KEPT,
                   '(?s)boots: QEMU has ended.*It is of another machine')
        self.begin(first, self.lib.LOADED)

    def test_not_written(self):
        """Catches a campaign that ends because a file cannot be written."""
        booted = self.lib.BOOTED
        path = self.keep(file='/nowhere/x', name='nowhere')
        self.begin(path, booted, 'nowhere/x.key: No such file')
        # Each is told once.
        path = self.keep(file=self.folder, name='folder')
        self.begin(path, booted, 'is not written, each start boots', stop=False)
        self.begin(path, self.lib.RAN)

    def test_disk(self):
        """A disk that the guest has not written to is part of the machine."""
        image = self.folder / 'image'
        image.write_bytes(bytes(1 << 20))
        path = self.keep(f'-drive file={image},format=raw,if=none,id=d',
                         '-device virtio-blk-pci,drive=d')
        self.begin(path, self.lib.KEPT)
        self.begin(path, self.lib.LOADED)
        image.write_bytes(bytes(1 << 20))
        self.begin(path, self.lib.KEPT, 'image has changed')

    def test_monitor_taken(self):
        """Somebody has the monitor: one try, and the machine is there."""
        path = self.keep()
        process = self.begin_apart(self.lib.Machine, path)
        socket = None
        while not socket:
            try:
                status = self.lib.status(path)
                socket = status and monitor(os.fsdecode(status.directory))
            except ConnectError:
                time.sleep(0.002)
        self.assertIsNone(self.end_apart(40, process))
        socket.close()
        self.assertFalse(self.file.exists())
        self.begin(path, self.lib.RAN)
        self.begin(path, self.lib.KEPT)

    def test_at_once(self):
        """
        Catches: instances that start at the same time and use half a file, or
        one that is not of them; and one that waits for another that was killed.
        """
        path = self.keep()
        programs = [subprocess.Popen(
            [host_programs() / 'snapshot-vm', 'start', path, str(i)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for i in range(4)]
        output = [program.communicate()[0] for program in programs]
        text = '\n'.join(output)
        self.assertEqual([p.returncode for p in programs], 4 * [0], text)
        self.assertIn('booted, and kept in', text)
        for i in range(4):
            with self.lib.Machine(path, i, self.lib.ATTACH) as vm:
                self.check_runs(vm)
        self.lib.stop(path)
        self.begin(path, self.lib.LOADED)
        self.assertEqual(sorted(os.listdir(self.folder)),
                         [self.file.name, self.key.name])

    def test_killed(self):
        """Catches what a killed program leaves, and is in the way."""
        path = self.keep()
        for wait in 0.1, 0.3, 0.5, 0.7, 0.9:
            program = subprocess.Popen(
                [host_programs() / 'snapshot-vm', 'start', path],
                stdout=subprocess.DEVNULL)
            time.sleep(wait)
            status = self.lib.status(path)
            program.kill()
            program.wait()
            if status and status.qemu:
                os.kill(status.qemu, signal.SIGKILL)
                self.wait_until(lambda: not self.lib.status(path).qemu)
        left = Path(f'{self.file}.new.1234.abcdef')
        left.write_bytes(b'x')
        for file in self.file, self.key:
            file.unlink(missing_ok=True)
        self.begin(path, self.lib.KEPT)
        self.assertFalse(left.exists())
        self.begin(path, self.lib.LOADED)

    def test_instances_differ(self):
        """Instances that differ have each a file, if they are told to."""
        path = self.keep('-smbios type=1,serial=s${instance}',
                         file=self.folder / '${instance}.snap')
        for began in self.lib.KEPT, self.lib.LOADED:
            for i in range(2):
                self.begin(path, began, instance=i)
        self.assertTrue((self.folder / '1.snap').exists())

    def test_both(self):
        self.assert_fails(self.lib.E_DESCRIPTION, '"load="', self.lib.Machine,
                          self.keep('device = load=x'))
        self.assert_fails(self.lib.E_DESCRIPTION, 'must be a file',
                          self.lib.Machine, self.describe('keep =', 'qemu = x'))


class Many(KeepTest):
    """All machines begin from one file."""

    def pss(self, pid):
        text = Path(f'/proc/{pid}/smaps_rollup').read_text()
        return int(re.search(r'(?m)^Pss: +(\d+)', text)[1]) / 1024

    def work(self, path, i):
        return subprocess.Popen([sys.executable, '-c', WORKER, HOST, path,
                                 str(i), str(RUNS)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def test_exact(self):
        """
        Catches: a machine that sees what another has written, a restore that
        does not bring back what is in the file, and one that the end of
        another, by SIGKILL in the middle of a run, harms.
        """
        path = self.keep('device = verify=100')
        self.begin(path, self.lib.KEPT)
        before = time.monotonic()
        text = self.start(path, '-n', str(WORKERS))
        took = time.monotonic() - before
        self.assertEqual(len(re.findall(r'READY after .*, from', text)),
                         WORKERS, text)
        self.assertIn(f'{WORKERS} instances are READY after', text)
        qemus = [self.qemu(path, i) for i in range(WORKERS)]
        start = [self.pss(qemu) for qemu in qemus]

        # One is killed when it has begun to work.
        victim = self.work(path, 1)
        victim.stdout.readline()
        rest = [i for i in range(WORKERS) if i != 1]
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(lambda i: self.work(path, i).communicate()
                                [1], i) for i in rest]
            os.kill(qemus[1], signal.SIGKILL)
            victim.kill()
            victim.communicate()
            for job in jobs:
                self.assertEqual(job.result(), '')
        for i in rest:
            status = self.lib.status(path, i)
            self.assertEqual(status.qemu, qemus[i])
            qmp = monitor(status.directory)
            info = qmp.cmd('x-query-snapshot-device')
            qmp.close()
            self.assertGreaterEqual(info['restores'], RUNS)
            self.assertGreaterEqual(info['verified'], RUNS // 100)
            self.assertEqual(info['mismatched'], 0, info)
        end = [self.pss(qemus[i]) for i in rest]
        print(f'# {WORKERS} machines from one file: READY after {took:.1f} s; '
              f'PSS of each {sum(start) / len(start):.1f} MiB, '
              f'{max(start):.1f} at most, and after {RUNS} runs '
              f'{sum(end) / len(end):.1f}, {max(end):.1f} at most')
        before = time.monotonic()
        self.assertEqual(self.lib.stop(path), WORKERS - 1)
        print(f'# all ended after {time.monotonic() - before:.1f} s')

    def test_cpus(self):
        """Catches instances that all start on one CPU."""
        cpus = os.sched_getaffinity(0)
        if len(cpus) < 2:
            self.skipTest('there is one CPU')
        path = self.keep('idle = 0')
        self.begin(path, self.lib.KEPT)
        program = subprocess.Popen(
            [host_programs() / 'snapshot-vm', 'start', path, '-n', '5'],
            stdout=subprocess.PIPE, text=True)
        seen = set()
        while program.poll() is None:
            children = Path(f'/proc/{program.pid}/task/{program.pid}/children')
            try:
                for child in children.read_text().split():
                    seen.add(frozenset(os.sched_getaffinity(int(child))))
            except OSError:
                pass
        text = program.communicate()[0]
        self.assertIn('5 instances are READY', text)
        self.assertGreaterEqual(len({s for s in seen if len(s) == 1}), 2, seen)
        for n in '0', '1025', 'x', '1.5':
            done = subprocess.run([host_programs() / 'snapshot-vm', 'start',
                                   path, '-n', n], stderr=subprocess.PIPE,
                                  text=True)
            self.assertEqual(done.returncode, 2)
            self.assertIn('no number of instances', done.stderr)


if __name__ == '__main__':
    KeepTest.main()

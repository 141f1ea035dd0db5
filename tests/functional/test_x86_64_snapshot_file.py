#!/usr/bin/env python3
#
# Functional test of the snapshot device: Linux guests that start from a file
#
# SPDX-License-Identifier: GPL-2.0-or-later

import hashlib
import os
from pathlib import Path
import re
import time

from qemu_test import QemuSystemTest

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


class SnapshotFile(QemuSystemTest):
    """
    A shell on the console of a guest that scripts/linux-guest has packed, and
    other processes that go on with that guest.
    """

    PATIENCE = int(os.getenv('QEMU_TEST_SNAPSHOT_PATIENCE', '1'))
    WORKERS = 20 if os.getenv('FULL') else 4

    def setUp(self):
        super().setUp()
        self.linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX',
                                    ROOT / 'build/linux'))
        if not (self.linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {self.linux}: run '
                          'scripts/linux-guest')
        self.require_device('name "snapshot"')
        self.file = Path(self.scratch_file('booted.snap'))

    def make(self, name, *args, device='snapshot'):
        vm = self.get_vm('-M', 'q35', '-nodefaults', '-accel', 'tcg', '-m',
                         '128', '-rtc', 'clock=vm', '-no-reboot',
                         '-kernel', str(self.linux / 'vmlinuz'),
                         '-initrd', str(self.linux / 'initramfs'),
                         '-append', 'console=ttyS0 panic=-1 quiet '
                         'ipv6.disable=1 no_timer_check', *args, name=name)
        if device:
            vm.add_args('-device', device)
        vm.set_console()
        vm.launch()
        vm.console_socket.settimeout(60 * self.PATIENCE)
        return vm

    @staticmethod
    def wait_for(vm, pattern):
        """What the console says until then"""
        seen = ''
        while not re.search(pattern, seen):
            data = vm.console_socket.recv(4096)
            assert data, f'the console ended, no {pattern} in: {seen}'
            seen += data.decode(errors='replace')
        return seen

    def sh(self, vm, command):
        """Run a command of one line in the guest.  What it prints"""
        vm.console_socket.sendall(
            f"echo be''gin; {command}; echo do''ne\n".encode())
        seen = self.wait_for(vm, r'(?m)^done\r?$').replace('\r', '')
        return seen.partition('begin\n')[2].rpartition('done')[0].strip()

    def boot(self, *args, **kwargs):
        vm = self.make('first', *args, **kwargs)
        self.wait_for(vm, r'[#$] ')
        # Enough for pages of all kinds, and to know them again
        self.sh(vm, 'stty -echo; head -c 8000000 /dev/urandom >/tmp/f')
        self.sh(vm, 'head -c 2000000 /dev/zero >/tmp/z')
        self.sum = self.sh(vm, 'md5sum /tmp/f /tmp/z | md5sum')
        self.assertRegex(self.sum, '^[0-9a-f]{32}')
        return vm

    def save_by_itself(self, vm):
        """
        Leave a program that prints what its save came to, and what is as it
        was then.
        """
        vm.console_socket.sendall(
            b'w=$(snapshotctl save); '
            b'echo "woke: $w: $(md5sum /tmp/f /tmp/z | md5sum)"\n')

    def assert_woke(self, vm, status):
        text = self.wait_for(vm, r'woke: .*\n').replace('\r', '')
        self.assertIn(f'woke: {status}: {self.sum}', text)

    def job(self, vm, job='e'):
        """Wait for the job's end.  Its error, if any"""
        while True:
            info = [j for j in vm.cmd('query-jobs') if j['id'] == job][0]
            if info['status'] == 'concluded':
                vm.cmd('job-dismiss', id=job)
                return info.get('error')
            time.sleep(0.02)

    def export(self, vm, slot=0, file=None):
        vm.cmd('x-snapshot-device-export', job_id='e', slot=slot,
               file=str(file or self.file))
        self.assertIsNone(self.job(vm))

    def assert_exact(self, vm, slot=0):
        vm.cmd('stop')
        vm.cmd('x-snapshot-device-restore', slot=slot)
        found = vm.cmd('x-snapshot-device-verify', slot=slot)
        self.assertEqual((found['pages'], found['fields']), (0, 0), found)

    def worker(self, name, *args, device='snapshot'):
        return self.make(name, *args, device=f'{device},load={self.file}')

    def do_guest_saves(self, device):
        first = self.boot(device=device)
        self.save_by_itself(first)
        self.assert_woke(first, 'saved')
        # It runs on, and changes all that is in the slot.
        self.sh(first, 'head -c 9000000 /dev/urandom >/tmp/f; rm /tmp/z')
        self.export(first)
        self.assertEqual(self.sh(first, 'ls /tmp'), 'f')
        first.shutdown()

        workers = [self.worker(f'w{i}', device=device)
                   for i in range(self.WORKERS)]
        for vm in workers:
            self.assert_woke(vm, 'restored 1')
        # One that goes at any time is nothing to the others.
        workers[0].console_socket.sendall(b'snapshotctl restore\n')
        victim = workers.pop(1)
        victim.kill()
        self.assert_woke(workers[0], 'restored 2')
        for vm in workers[1:]:
            self.sh(vm, 'head -c 9000000 /dev/urandom >/tmp/f; rm /tmp/z')
            vm.console_socket.sendall(b'snapshotctl restore\n')
            self.assert_woke(vm, 'restored 2')
            self.assertEqual(self.sh(vm, 'dmesg | grep -c -e BUG: -e WARNING: '
                                     '-e Oops -e stall'), '0')
        for vm in workers:
            self.assert_exact(vm)
        # What they start from is what it was.
        vm = self.worker('last', device=device)
        self.assert_woke(vm, 'restored 1')

    def test_guest_saves_dirty(self):
        """
        Catches: a worker that does not wake up behind its store, or with the
        STATUS or the count of another time; one whose memory is not what it was
        at the save; one that harms another, or the file.
        """
        self.do_guest_saves('snapshot,ram=dirty')

    def test_guest_saves_remap(self):
        """Catches: the same, where RAM lies on the file in any case."""
        self.do_guest_saves('snapshot,ram=remap')

    def ram(self, vm, name):
        """A sum of all RAM but for where the VGA's window may be"""
        path = Path(self.scratch_file(name))
        digest = hashlib.sha256()
        for start, size in (0, 640 << 10), (MIB, 127 * MIB):
            vm.cmd('pmemsave', val=start, size=size, filename=str(path))
            digest.update(path.read_bytes())
            path.unlink()
        return digest.hexdigest()

    @staticmethod
    def registers(vm):
        return vm.cmd('human-monitor-command', command_line='info registers')

    def test_incoming(self):
        """
        Catches: a file that a QEMU without the device cannot load, or that has
        another machine for it than the slot is: it is loaded and runs on.
        """
        first = self.boot(device='snapshot,addr=0x1e')
        first.cmd('x-snapshot-device-save', slot=0)
        self.sh(first, 'rm /tmp/z')
        self.export(first)
        self.assert_exact(first)

        other = self.make('other', '-S', '-global', 'migration.mapped-ram=on',
                          '-incoming', f'file:{self.file}', device=None)
        while other.cmd('query-status')['status'] == 'inmigrate':
            time.sleep(0.02)
        # In one that has run, "info registers" adds flags of what it ran last.
        fresh = self.worker('fresh', '-S', device='snapshot,addr=0x1e')
        self.assertEqual(self.registers(other), self.registers(fresh))
        self.assertEqual(self.ram(other, 'a'), self.ram(first, 'b'))
        other.cmd('cont')
        self.assertEqual(self.sh(other, 'md5sum /tmp/f /tmp/z | md5sum'),
                         self.sum)

    def do_moments(self, ram):
        """What ls prints, and a sum of all, is another at each moment."""
        names = ['booted.snap', 'login.snap', 'later.snap']
        files = [Path(self.scratch_file(name)) for name in names]
        steps = ('true', 'echo a >/tmp/a; rm /tmp/z',
                 'head -c 300000 /dev/urandom >/tmp/b; echo c >>/tmp/a')
        look = 'ls /tmp; cat /tmp/* | md5sum'
        device = f'snapshot,slots=3,ram={ram}'
        first = self.boot(device=device)
        seen = []
        for i, step in enumerate(steps):
            self.sh(first, step)
            seen.append(self.sh(first, look))
            first.cmd('x-snapshot-device-save', slot=i)
            base = {'base': str(files[i - 1])} if i else {}
            first.cmd('x-snapshot-device-export', job_id='e', slot=i,
                      file=str(files[i]), **base)
            self.assertIsNone(self.job(first))
        first.shutdown()
        sizes = [file.stat().st_blocks * 512 for file in files]
        self.log.info('%s bytes', sizes)
        self.assertLess(max(sizes[1:]), sizes[0] / 3)

        self.file = files[2]
        vm = self.worker('worker', device=device)
        self.assertEqual(self.sh(vm, look), seen[2])
        vm.cmd('x-snapshot-device-import', slot=1, file=str(files[1]))
        vm.cmd('x-snapshot-device-import', slot=2, file=str(files[0]))
        for slot in 1, 2, 0, 1, 0, 2:
            vm.cmd('x-snapshot-device-restore', slot=slot)
            self.assertEqual(self.sh(vm, look), seen[(2, 1, 0)[slot]])
            self.assert_exact(vm, slot)
            vm.cmd('cont')

    def test_moments_dirty(self):
        """
        Catches: a moment of a Linux guest, in a row of files, that has pages of
        another one; a file with a base that has much of what the base has.
        """
        self.do_moments('dirty')

    def test_moments_remap(self):
        """Catches: the same, where files are copied into the store."""
        self.do_moments('remap')

    def test_killed(self):
        """
        Catches: a process that is killed while it writes a file and takes the
        old one with it; what it leaves has another name.
        """
        first = self.boot()
        self.save_by_itself(first)
        self.assert_woke(first, 'saved')
        self.export(first)
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
        self.sh(first, 'rm /tmp/z')
        first.cmd('x-snapshot-device-save', slot=1)
        first.cmd('x-snapshot-device-export', job_id='e', slot=1,
                  file=str(self.file), speed=8 * MIB)
        # The guest does not wait for it.
        self.assertEqual(self.sh(first, 'ls /tmp'), 'f')
        info = first.cmd('query-jobs')[0]
        self.assertEqual(info['status'], 'running')
        self.assertLess(info['current-progress'], info['total-progress'])
        first.kill()
        self.assertEqual(hashlib.sha256(self.file.read_bytes()).hexdigest(),
                         digest)
        vm = self.worker('worker')
        self.assert_woke(vm, 'restored 1')


class SnapshotFileDisk(QemuSystemTest):
    """
    A disk that the host writes to in the guest's place, by qemu-io, of which
    QEMU's log tells what it found.
    """

    # Of the disk's image, each MiB of which has a number of its own
    SIZE = 16 * MIB
    # What is written before the save, and what of it is written anew after
    BEFORE = ('write -P 0xaa 1M 64k', 'write -P 0xbb 5000k 512',
              'write -z 3M 1M')
    AFTER = 'write -P 0xcc 0 6M'
    SAVED = ('read -P 1 0 1M', 'read -P 0xaa 1M 64k', 'read -P 2 1088k 4k',
             'read -P 0 3M 1M', 'read -P 5 4M 64k', 'read -P 0xbb 5000k 512',
             'read -P 5 5120512 512', 'read -P 16 15M 1M')

    def setUp(self):
        super().setUp()
        self.require_device('name "snapshot"')
        self.directory = Path(self.scratch_file('disk'))
        self.directory.mkdir()
        self.image = self.directory / 'image'
        with open(self.image, 'wb') as f:
            for i in range(self.SIZE // MIB):
                f.write(bytes([i + 1]) * MIB)
        self.file = self.directory / 'slot'
        self.written = self.directory / 'slot.0.qcow2'

    def make(self, image, form, name, *options):
        vm = self.get_vm('-M', 'pc', '-nodefaults', '-m', '16', '-S', '-accel',
                         'tcg', '-blockdev', 'driver=snapshot-overlay,'
                         f'node-name=hd,file.driver={form},'
                         f'file.file.driver=file,file.file.filename={image}',
                         '-device', 'ide-hd,drive=hd,id=disk', '-device',
                         ','.join(['snapshot', *options]), name=name)
        vm.launch()
        return vm

    def io(self, vm, *commands):
        for command in commands:
            said = vm.cmd('human-monitor-command',
                          command_line=f'qemu-io -d disk "{command}"')
            self.assertEqual(said.strip(), '')

    def export(self, vm, slot):
        vm.cmd('x-snapshot-device-export', job_id='e', slot=slot,
               file=str(self.file))

    def finish(self, vm):
        end = time.monotonic() + 60
        while (job := vm.cmd('query-jobs')[0])['status'] != 'concluded':
            self.assertLess(time.monotonic(), end)
            time.sleep(0.01)
        vm.cmd('job-dismiss', id='e')
        self.assertNotIn('error', job)

    def end(self, vm):
        vm.shutdown()
        self.assertNotIn('Pattern verification failed', vm.get_log())

    def refused(self, image, form, name, text):
        vm = self.get_vm('-M', 'pc', '-nodefaults', '-m', '16', '-S', '-accel',
                         'tcg', '-blockdev', 'driver=snapshot-overlay,'
                         f'node-name=hd,file.driver={form},'
                         f'file.file.driver=file,file.file.filename={image}',
                         '-device', 'ide-hd,drive=hd,id=disk', '-device',
                         f'snapshot,load={self.file}', name=name)
        vm.set_qmp_monitor(False)
        vm.launch()
        vm.wait(timeout=60)
        self.assertEqual(vm.exitcode(), 1)
        self.assertIn(text, vm.get_log())

    def test_disk(self):
        """
        Catches: content of now, or of another slot, in the image; an image that
        is not the file's; what a worker writes left over in the next restore.
        """
        vm = self.make(self.image, 'raw', 'first')
        digest = hashlib.sha256(self.image.read_bytes()).digest()
        vm.cmd('x-snapshot-device-save', slot=0)
        self.export(vm, 0)
        self.finish(vm)
        self.assertFalse(self.written.exists(), 'nothing was written')
        unchanged = self.make(self.image, 'raw', 'unchanged',
                              f'load={self.file}')
        self.io(unchanged, f'read -P 1 0 {MIB}')
        self.end(unchanged)

        self.io(vm, *self.BEFORE)
        vm.cmd('x-snapshot-device-save', slot=1)
        self.export(vm, 1)
        self.io(vm, self.AFTER)
        vm.cmd('x-snapshot-device-discard', slot=1)
        self.finish(vm)
        self.io(vm, 'read -P 0xcc 0 6M')
        self.end(vm)
        self.assertEqual(sorted(x.name for x in self.directory.iterdir()),
                         ['image', 'slot', 'slot.0.qcow2'])

        workers = [self.make(self.written, 'qcow2', f'worker{i}',
                             f'load={self.file}') for i in range(2)]
        for worker in workers:
            self.io(worker, *self.SAVED, self.AFTER)
        for worker in workers:
            worker.cmd('x-snapshot-device-restore', slot=0)
            self.io(worker, *self.SAVED)
            self.end(worker)
        self.assertEqual(hashlib.sha256(self.image.read_bytes()).digest(),
                         digest)

        self.refused(self.image, 'raw', 'other', 'is to be the image')
        before = os.stat(self.image)
        os.utime(self.image)
        self.refused(self.written, 'qcow2', 'below',
                     "'image' is another one, or was written to since")
        os.utime(self.image, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.written.chmod(0o600)
        os.utime(self.written)
        self.refused(self.written, 'qcow2', 'touched', 'is to be the image')


if __name__ == '__main__':
    QemuSystemTest.main()

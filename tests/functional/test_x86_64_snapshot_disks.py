#!/usr/bin/env python3
#
# Functional test of the snapshot device: a Linux guest's disks under load
#
# SPDX-License-Identifier: GPL-2.0-or-later

from collections import namedtuple
from dataclasses import dataclass
import hashlib
import os
from pathlib import Path
import random
import socket
import subprocess
import time

from qemu.machine.machine import VMLaunchFailure
from qemu_test import QemuSystemTest, skipSlowTest

FULL = os.getenv('QEMU_TEST_ALLOW_SLOW')
# How many times slower QEMU is than one without sanitizers
PATIENCE = int(os.getenv('QEMU_TEST_SNAPSHOT_PATIENCE', '1'))
TIMEOUT = 300 * PATIENCE

Controller = namedtuple('Controller', 'machine drivers disk args')

CONTROLLERS = {
    'virtio_blk': Controller('pc', 'virtio_pci,virtio_blk', '/dev/vda',
                             '-device virtio-blk-pci,drive=disk'),
    'iothread': Controller('q35', 'virtio_pci,virtio_blk', '/dev/vda',
                           '-object iothread,id=io '
                           '-device virtio-blk-pci,drive=disk,iothread=io'),
    'queues': Controller('q35', 'virtio_pci,virtio_blk', '/dev/vda',
                         '-object iothread,id=a -object iothread,id=b -device '
                         '{"driver":"virtio-blk-pci","drive":"disk",'
                         '"num-queues":2,"iothread-vq-mapping":'
                         '[{"iothread":"a"},{"iothread":"b"}]} -smp 2'),
    'virtio_scsi': Controller('q35', 'virtio_pci,virtio_scsi,sd_mod',
                              '/dev/sda', '-device virtio-scsi-pci '
                              '-device scsi-hd,drive=disk'),
    'ahci': Controller('q35', 'ahci,sd_mod', '/dev/sda',
                       '-device ide-hd,drive=disk'),
    'piix': Controller('pc', 'ata_piix,sd_mod', '/dev/sda',
                       '-device ide-hd,drive=disk'),
    'nvme': Controller('q35', 'nvme', '/dev/nvme0n1',
                       '-device nvme,serial=1,drive=disk'),
}

FILE_SYSTEMS = 'ext4', 'xfs', 'btrfs'
OFTEN = {
    ('ext4', 'virtio_blk'), ('xfs', 'iothread'), ('btrfs', 'virtio_scsi'),
    ('btrfs', 'queues'),
    ('ext4', 'ahci'), ('ext4', 'piix'), ('xfs', 'nvme'),
}


@dataclass
class Guest:
    vm: object
    serial: Path
    line: socket.socket

    def output(self):
        """What the guest has printed so far"""
        try:
            return self.serial.read_text(errors='replace').replace('\r', '')
        except FileNotFoundError:
            return ''


def digest(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


class SnapshotDisks(QemuSystemTest):
    """
    A Linux guest writes to a file system on each kind of disk, while the host
    saves and restores it at any moment. What it runs lies in
    tests/functional/snapshot-linux; scripts/linux-guest --disks packs that.
    """

    def setUp(self):
        super().setUp()
        # Seeded, so that a failure has a chance to come back
        self.rng = random.Random(1)
        self.guests = []

    def tearDown(self):
        super().tearDown()
        for guest in self.guests:
            guest.line.close()
    def image(self, fmt='qcow2', name='disk', size='512M'):
        path = Path(self.scratch_file(name))
        subprocess.run([os.environ['QEMU_TEST_QEMU_IMG'], 'create', '-q',
                        '-f', fmt, path, size], check=True)
        return path

    def boot(self, controller, run, *args, name='guest'):
        """Start a guest that runs @run, words with commas between them."""
        linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX',
                               Path(__file__).resolve().parents[2] /
                               'build/linux')) / 'disks'
        if not (linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {linux}: '
                          'run scripts/linux-guest --disks')
        self.require_device('name "snapshot"')
        vm = self.get_vm(name=name)
        serial = Path(self.log_file(f'serial-{name}.log'))
        serial.unlink(missing_ok=True)
        line = os.path.join(self.socket_dir().name, f'line-{name}')
        vm.set_machine(controller.machine)
        vm.add_args('-accel', 'tcg', '-m', '512', '-no-reboot',
                    '-serial', f'file:{serial}',
                    '-chardev', f'socket,id=line,path={line},server=on,'
                                'wait=off',
                    '-serial', 'chardev:line',
                    '-kernel', str(linux.parent / 'drivers/vmlinuz'),
                    '-initrd', str(linux / 'initramfs'),
                    '-append', 'console=ttyS0 panic=-1 no_timer_check quiet '
                               'snapshot.modules=crc32c_generic,ext4,xfs,'
                               f'btrfs,{controller.drivers} '
                               f'snapshot.run={run}', *args)
        vm.launch()
        guest = Guest(vm, serial, socket.socket(socket.AF_UNIX))
        self.guests.append(guest)
        guest.line.connect(line)
        return guest

    def wait_for(self, guest, text, timeout=TIMEOUT):
        end = time.monotonic() + timeout
        while text not in guest.output():
            output = guest.output()
            self.assertTrue(guest.vm.is_running(), output[-2000:])
            self.assertNotIn('FAILED', output, output[-2000:])
            self.assertLess(time.monotonic(), end, output[-2000:])
            time.sleep(0.05)

    def finish(self, guest, text, timeout=2 * TIMEOUT):
        """Let the guest stop what it does; it must be content."""
        guest.line.sendall(b'stop\n')
        guest.vm.wait(timeout=timeout)
        output = guest.output()
        self.assertIn(text, output, output[-3000:])
        # A disk that is not what the kernel knows of it makes it complain.
        for words in ('error', 'BUG:', 'WARNING:', 'Call Trace', 'corrupt',
                      'reset', 'timeout', 'blocked for more'):
            complaints = [line for line in output.split('\n')
                          if words in line and 'rrors=' not in line]
            self.assertEqual(complaints, [], output[-3000:])

    def restore(self, guest, saves, restores):
        """
        At moments that nobody in the guest chose, with requests in flight. The
        image's digest at the first save.
        """
        vm = guest.vm
        image = None
        written = []
        for save in range(saves):
            time.sleep(self.rng.uniform(0, 0.5))
            slot = save % 3
            vm.cmd('x-snapshot-device-save', slot=slot)
            if not save:
                image = digest(self.disk)
            for i in range(restores // saves):
                # Now and then long enough for damage to show
                time.sleep(self.rng.uniform(0, 0.05 if i % 5 else 1))
                if i % 4 == 3:
                    slot = self.rng.randrange(min(save + 1, 3))
                self.assertNotIn('FAILED', guest.output())
                disk, = vm.cmd('x-query-snapshot-device')['disks']
                written.append(disk['clusters'])
                vm.cmd('x-snapshot-device-restore', slot=slot)
        self.log.info('clusters written at each restore: %s', written)
        self.assertGreater(max(written), 0, 'nothing was written')
        return image

    # What keeps the disk busy: files that change, and fio or a database

    def do_load(self, controller, *words, fmt='qcow2'):
        """
        Catches a disk that does not go back, or to another instant than the
        kernel and its requests in flight: what is read is not what memory
        knows, and in the end fsck finds faults. And anything that is written
        to the image after the first save.
        """
        controller = CONTROLLERS[controller]
        self.disk = self.image(fmt)
        guest = self.boot(controller, ','.join(('load', words[0],
                                                controller.disk, *words[1:])),
                          '-device', 'snapshot', '-drive',
                          f'if=none,id=disk,format={fmt},file={self.disk},'
                          'discard=unmap', *controller.args.split())
        self.wait_for(guest, 'load: go')
        image = self.restore(guest, *((50, 1000) if FULL else (4, 24)))
        self.finish(guest, 'load: ok')
        self.assertEqual(digest(self.disk), image, 'written to the image')

    def test_sqlite_wal(self):
        """
        Catches a database whose log, index, and memory that is shared by
        processes are not of one time.
        """
        self.do_load('virtio_blk', 'ext4', 'wal')

    @skipSlowTest()
    def test_sqlite_delete(self):
        self.do_load('ahci', 'btrfs', 'delete', fmt='raw')

    # Power is lost, for QEMU at least

    def do_kill(self, fmt):
        """
        Catches anything written to the image after the first save; and a save
        that leaves the image not as a disk is after a loss of power.
        """
        controller = CONTROLLERS['iothread']
        self.disk = self.image(fmt)
        args = ('-device', 'snapshot', '-drive', f'if=none,id=disk,'
                f'format={fmt},file={self.disk},discard=unmap',
                *controller.args.split())
        guest = self.boot(controller, f'load,ext4,{controller.disk}', *args)
        self.wait_for(guest, 'load: go')
        image = self.restore(guest, 1, 4)
        time.sleep(self.rng.uniform(0, 1))
        guest.vm.kill()
        self.assertEqual(digest(self.disk), image, 'written to the image')

        # fsck finds nothing but a journal, and nothing that it leaves.
        guest = self.boot(controller, f'replay,{controller.disk}', *args,
                          name='next')
        guest.vm.wait(timeout=TIMEOUT)
        self.assertIn('guest: replay exited with 0', guest.output())

    @skipSlowTest()
    def test_kill_raw(self):
        self.do_kill('raw')

    def test_kill_qcow2(self):
        self.do_kill('qcow2')

    # Several machines on one image

    def shared(self):
        """An overlay by hand, on an image that any number may have open"""
        return ('-device', 'snapshot',
                '-blockdev', 'driver=file,node-name=file,read-only=on,'
                f'filename={self.disk}',
                '-blockdev', 'driver=qcow2,node-name=base,file=file,'
                'read-only=on',
                '-blockdev', 'driver=snapshot-overlay,node-name=disk,'
                'file=base,discard=unmap')

    def test_two(self):
        """
        Both write all the time, with other file systems. Catches machines
        that see what another writes, or that lock each other out.
        """
        self.disk = self.image()
        before = digest(self.disk)
        guests = []
        for name, fs, controller in (('one', 'ext4', 'virtio_blk'),
                                     ('two', 'xfs', 'virtio_scsi')):
            controller = CONTROLLERS[controller]
            guests.append(self.boot(controller,
                                    f'load,{fs},{controller.disk}',
                                    *self.shared(), *controller.args.split(),
                                    name=name))
        for guest in guests:
            self.wait_for(guest, 'load: go')
        for guest in guests * 2:
            self.restore(guest, 1, 5)
        for guest in guests:
            self.finish(guest, 'load: ok')
        self.assertEqual(digest(self.disk), before, 'written to the image')

    def test_lock(self):
        """
        A disk of -drive is locked for writing until the first save, then for
        reading. Catches an image that somebody can write to while it is below
        an overlay, and one that is locked longer than it need be.
        """
        self.disk = self.image()

        def start(name, *args):
            vm = self.get_vm(name=name)
            vm.set_machine('q35')
            vm.add_args('-accel', 'tcg', '-S', *args)
            try:
                vm.launch()
            except VMLaunchFailure as e:
                self.assertIn('lock', e.output)
                return None
            return vm

        mine = ('-device', 'snapshot',
                '-drive', f'if=virtio,format=qcow2,file={self.disk}')
        beside = (*self.shared(), '-device', 'virtio-blk-pci,drive=disk')
        first = start('first', *mine)
        self.assertIsNone(start('second', *mine))
        self.assertIsNone(start('third', *beside))
        first.cmd('x-snapshot-device-save', slot=0)
        self.assertIsNone(start('fourth', *mine))
        fifth = start('fifth', *beside)
        fifth.cmd('x-snapshot-device-save', slot=0)
        first.cmd('x-snapshot-device-restore', slot=0)
        fifth.cmd('x-snapshot-device-restore', slot=0)

    def test_told(self):
        """
        Catches a user who is not told that what the guest writes will be lost,
        or is though it is not.
        """
        self.disk = self.image()
        for device, drive, told in (('snapshot', '', True),
                                    ('snapshot', ',snapshot=on', False),
                                    ('snapshot', ',readonly=on', False),
                                    ('snapshot,disks=keep', '', False)):
            vm = self.get_vm(name=f'{device}{drive}')
            vm.add_args('-S', '-device', device, '-drive',
                        f'if=virtio,format=qcow2,file={self.disk}{drive}')
            vm.launch()
            vm.shutdown()
            self.assertEqual('lost when QEMU ends' in (vm.get_log() or ''),
                             told, f'{device}{drive}: {vm.get_log()}')

    # The guest restores itself

    def test_mounted(self):
        """
        Catches a disk that goes back with the host's restores only, or only
        where no file system is mounted.
        """
        controller = CONTROLLERS['virtio_blk']
        self.disk = self.image('raw', size='16M')
        guest = self.boot(controller, 'mounted,6', '-device',
                          'snapshot,verify=on', '-drive',
                          f'if=none,id=disk,format=raw,file={self.disk}',
                          *controller.args.split())
        guest.vm.wait(timeout=TIMEOUT)
        self.assertIn('mounted: ok', guest.output(), guest.output()[-2000:])


def add_loads():
    """A case for each file system on each disk, a few of them always run"""
    for fs in FILE_SYSTEMS:
        for controller in CONTROLLERS:
            def test(self, fs=fs, controller=controller):
                self.do_load(controller, fs)
            if FULL or (fs, controller) in OFTEN:
                setattr(SnapshotDisks, f'test_{fs}_{controller}', test)


add_loads()

if __name__ == '__main__':
    QemuSystemTest.main()

#!/usr/bin/env python3
#
# Functional test of the snapshot device while disks are read
#
# SPDX-License-Identifier: GPL-2.0-or-later

from array import array
import os
from pathlib import Path
import random
import subprocess
import time

from qemu_test import QemuSystemTest

HERE = Path(__file__).resolve().parent


class Reading(QemuSystemTest):
    """
    A boot sector reads its disk through SeaBIOS and adds up what it got, while
    the host saves and restores, with requests in flight. Catches a save in the
    middle of a request: that ends QEMU, cannot be loaded, or leaves a device
    that never answers; data of a request that was made before a restore and
    arrives after it; and a controller that a restore leaves set up wrongly.

    Each restore is verified. Not here are LSI 53C810, which SeaBIOS has no
    driver for, and two with which it fails without any snapshot: it does not
    get through its boot with a disk at an AM53C974, and reads now and then
    wrong data, or none, through UHCI.
    """

    FULL = bool(os.getenv('FULL'))

    # s of saves and restores, from the start and again while the disk is read
    SECONDS = 20 if FULL else 0.4

    PATIENCE = int(os.getenv('QEMU_TEST_SNAPSHOT_PATIENCE', '1'))
    DEADLINE = 60 * PATIENCE

    SECTOR = 512
    CHUNK = 64

    def disk(self, sectors):
        """Returns what the boot sector says of it."""
        flags = f'-m32 -DSECTORS={sectors} -DCHUNK={self.CHUNK}'.split()
        objects = self.scratch_file('boot.o')
        sector = self.scratch_file('boot.bin')
        subprocess.run(['gcc', *flags, '-c', '-o', objects,
                        HERE / 'snapshot-bios' / 'boot.S'], check=True)
        subprocess.run(['ld', '-m', 'elf_i386', '-Ttext=0x7c00',
                        '--oformat', 'binary', '-e', 'start', '-o', sector,
                        objects], check=True)
        data = Path(sector).read_bytes()
        self.assertEqual(len(data), self.SECTOR)
        data += random.Random(1).randbytes((sectors - 1) * self.SECTOR)
        Path(self.scratch_file('disk')).write_bytes(data)
        return f'{sum(array("I", data)) & 0xffffffff:08x}'

    def start(self, *args, machine, device, drive):
        self.require_accelerator('tcg')
        self.require_device('name "snapshot"')
        disk = self.scratch_file('disk')
        self.console = Path(self.scratch_file('console'))
        self.vm.set_machine(machine)
        self.vm.add_args('-nodefaults', '-accel', 'tcg', '-m', '16',
                         '-rtc', 'clock=vm', '-drive',
                         f'if=none,id=disk,format=raw,file={disk}{drive}',
                         *args, '-chardev',
                         f'file,id=debug,path={self.console}',
                         '-device', 'isa-debugcon,iobase=0xe9,chardev=debug',
                         '-device',
                         f'{device},slots=8,verify=on,'
                         'disks=keep')
        self.vm.launch()

    def lines(self):
        return self.console.read_text().split('\n')[:-1]

    def wait_for_lines(self, more):
        """The disk is read that often, and is what it is."""
        first = len(self.lines())
        end = time.monotonic() + self.DEADLINE
        while len(self.lines()) < first + more:
            self.assertLess(time.monotonic(), end, 'the guest reads no more')
            time.sleep(0.01)

    def storm(self, rng, done):
        """The guest is saved, and taken back to one of the last states."""
        end = time.monotonic() + self.SECONDS
        while time.monotonic() < end or done['restore'] < 10:
            time.sleep(0.003)
            name = 'restore' if done['slots'] and rng.random() < 0.6 else 'save'
            slot = rng.choice(sorted(done['slots'])) if name == 'restore' \
                else rng.randrange(8)
            reply = self.vm.qmp(f'x-snapshot-device-{name}', slot=slot)
            if 'error' in reply:
                # A controller that waits for the guest in mid-request
                self.assertRegex(reply['error']['desc'],
                                 'Saving .*(scsi-disk|scsi|lsi)')
                self.assertEqual(name, 'save')
                done['refused'] += 1
            else:
                done[name] += 1
                if name == 'save':
                    done['slots'].add(slot)

    def check(self, *args, machine='pc', device='snapshot,ram=dirty', drive='',
              sectors=2048):
        expected = self.disk(sectors)
        rng = random.Random(1)
        done = {'save': 0, 'restore': 0, 'refused': 0, 'slots': set()}
        self.start(*args, machine=machine, device=device, drive=drive)
        self.storm(rng, done)
        self.wait_for_lines(1)
        self.storm(rng, done)
        self.wait_for_lines(2)
        self.log.info('%s', done)
        self.assertEqual(set(self.lines()), {expected})
        info = self.vm.cmd('x-query-snapshot-device')
        self.assertEqual(info['verified'], done['restore'])
        self.assertEqual(info['mismatched'], 0, info['mismatches'])
        self.assertGreater(done['save'], done['refused'])

    def scsi(self, controller, *args, **options):
        self.check(*args, '-device', controller,
                   '-device', 'scsi-hd,drive=disk,bootindex=0', **options)

    def usb(self, controller, **options):
        self.check('-device', controller, '-device',
                   'usb-storage,drive=disk,bootindex=0', **options)

    # Requests that take 5 ms, most of which are in flight when it is saved
    SLOW = ',throttling.iops-total=200'

    def test_pvscsi(self):
        self.scsi('pvscsi')

    def test_lsi(self):
        self.scsi('lsi53c895a', drive=self.SLOW)

    def test_megasas(self):
        self.scsi('megasas')

    def test_megasas_gen2(self):
        self.scsi('megasas-gen2', machine='q35', device='snapshot,ram=remap')

    def test_mptsas(self):
        self.scsi('mptsas1068')

    def test_virtio_scsi(self):
        self.scsi('virtio-scsi-pci')

    def test_virtio_scsi_iothread(self):
        self.scsi('virtio-scsi-pci,iothread=io', '-object', 'iothread,id=io')

    def test_virtio_blk(self):
        self.check('-device', 'virtio-blk-pci,drive=disk,bootindex=0',
                   drive=self.SLOW)

    def test_virtio_blk_iothread(self):
        self.check('-object', 'iothread,id=io', '-device',
                   'virtio-blk-pci,drive=disk,bootindex=0,iothread=io',
                   machine='q35', device='snapshot,ram=remap')

    def test_piix_ide(self):
        self.check('-device', 'ide-hd,drive=disk,bootindex=0',
                   drive=self.SLOW.replace('200', '2000'))

    def test_ahci(self):
        self.check('-device', 'ide-hd,drive=disk,bootindex=0,bus=ide.0',
                   machine='q35')

    def test_ehci(self):
        self.usb('usb-ehci')

    def test_ohci(self):
        self.usb('pci-ohci')

    def test_xhci(self):
        self.usb('qemu-xhci', machine='q35', device='snapshot,ram=remap')

    def test_sd(self):
        self.check('-device', 'sdhci-pci', '-device', 'sd-card,drive=disk')

    def test_floppy(self):
        self.check('-device', 'floppy,drive=disk', sectors=2880)

    def test_nvme(self):
        self.check('-device', 'nvme,serial=1,drive=disk,bootindex=0',
                   machine='q35', drive=self.SLOW)


if __name__ == '__main__':
    QemuSystemTest.main()

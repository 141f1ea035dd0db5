# SPDX-License-Identifier: GPL-2.0-or-later
"""The machines that are measured against each other, in turns"""

import dataclasses
from pathlib import Path
import shutil

from measure import kvm_missing

CODE = Path('/usr/share/OVMF/OVMF_CODE_4M.fd')
VARS = CODE.with_name('OVMF_VARS_4M.fd')

# As libvirt makes it, with a driver for each device
LIBVIRT = '''
    -device pcie-root-port,id=r1,chassis=1,slot=1,multifunction=on,addr=0x2
    -device pcie-root-port,id=r2,chassis=2,slot=2,addr=0x2.1
    -device pcie-root-port,id=r3,chassis=3,slot=3,addr=0x2.2
    -device pcie-root-port,id=r4,chassis=4,slot=4,addr=0x2.3
    -device pcie-root-port,id=r5,chassis=5,slot=5,addr=0x2.4
    -device pcie-root-port,id=r6,chassis=6,slot=6,addr=0x2.5
    -device pcie-root-port,id=r7,chassis=7,slot=7,addr=0x2.6
    -netdev user,id=net -device virtio-net-pci,netdev=net,bus=r1
    -device qemu-xhci,id=usb,bus=r2 -device usb-tablet,bus=usb.0
    -device virtio-scsi-pci,id=scsi,bus=r3
    -drive if=none,id=vda,format=raw,readonly=on,file=DISK
    -device virtio-blk-pci,drive=vda,bus=r4
    -drive if=none,id=sda,format=raw,readonly=on,file=DISK
    -device scsi-hd,drive=sda,bus=scsi.0
    -device virtio-balloon-pci,bus=r5
    -device virtio-rng-pci,bus=r6
    -device virtio-vga
    -drive if=none,id=cd,media=cdrom,readonly=on,file=DISK,format=raw
    -device ide-cd,drive=cd,bus=ide.0
    -audiodev none,id=audio -device intel-hda -device hda-duplex,audiodev=audio
    -device pvpanic -device vmgenid'''
LIBVIRT_DRIVERS = (
    'virtio_pci,virtio_blk,virtio_net,virtio_scsi,sd_mod,virtio-gpu,'
    'virtio_balloon,virtio-rng,xhci-pci,usbhid,hid-generic,evdev,ahci,sr_mod,'
    'snd-hda-intel,snd-hda-codec-generic')
FLASH = ('-drive if=pflash,format=raw,readonly=on,file=CODE '
         '-drive if=pflash,format=raw,file=VARS')
VIRTIO = ('-netdev user,id=net -device virtio-net-pci,netdev=net '
          '-drive if=virtio,format=raw,readonly=on,file=DISK')


@dataclasses.dataclass(frozen=True)
class Shape:
    """
    A machine and its guest. @args may name files: DISK, CODE, VARS. With
    @drivers, the guest's kernel is the one that has a driver for each device.
    """

    name: str
    machine: str = 'q35'
    args: str = '-nodefaults'
    guest: str = 'linux'        # or bare
    accel: str = 'tcg'
    smp: int = 1
    pages: int = 10
    drivers: str = ''
    before: bool = False        # with the older binary
    options: str = 'ram=dirty'  # of the snapshot device

    def __str__(self):
        return self.name

    def command(self, bench):
        """QEMU's arguments, but for what Machine adds"""
        args = self.args
        for word, file in (('DISK', bench.disk), ('CODE', CODE),
                           ('VARS', bench.directory / 'vars.fd')):
            args = args.replace(word, str(file))
        if 'VARS' in self.args:
            shutil.copyfile(VARS, bench.directory / 'vars.fd')
        if self.guest == 'bare':
            kernel = ['-kernel', bench.image, '-append',
                      f'case=bench pages={self.pages} mark=1000000000']
        else:
            linux = bench.linux / 'drivers' if self.drivers else bench.linux
            modules = self.drivers and f'snapshot.modules={self.drivers} '
            kernel = ['-kernel', linux / 'vmlinuz',
                      '-initrd', linux / 'initramfs',
                      '-serial', 'chardev:console', '-no-reboot', '-append',
                      f'console=ttyS0 quiet panic=-1 {modules}'
                      'snapshot.run=bench']
        # A machine as somebody starts it has the RTC that it has by default
        rtc = ['-rtc', 'clock=vm'] if '-nodefaults' in args else []
        return ['-machine', self.machine, '-accel', self.accel,
                '-display', 'none', '-m',
                '128M' if self.guest == 'bare' else '256M',
                '-smp', str(self.smp), *rtc, *args.split(),
                *map(str, kernel),
                '-device', f'snapshot,{self.options}']


# The first of each is what the others are compared with.

PC = (Shape('pc -nodefaults', 'pc'), Shape('default pc', 'pc', ''))
Q35 = (Shape('q35 -nodefaults'), Shape('default q35', args=''),
       *(Shape(f'-smp {n}', smp=n) for n in (2, 4, 8)))
DRIVERS = (Shape('q35 -nodefaults, all drivers', drivers=LIBVIRT_DRIVERS),
           Shape('as libvirt makes it', args='-nodefaults' + LIBVIRT,
                 drivers=LIBVIRT_DRIVERS))
UEFI = (Q35[0], Shape('OVMF, writable variables', args='-nodefaults ' + FLASH))
KVM = (Shape('KVM, bare', 'pc', '-nodefaults', 'bare', 'kvm'),
       Shape('KVM, bare, -smp 2, virtio', 'pc', '-nodefaults ' + VIRTIO,
             'bare', 'kvm', 2))
BEFORE = (Shape('before', 'pc', '-nodefaults', 'bare', pages=0, before=True),
          Shape('now', 'pc', '-nodefaults', 'bare', pages=0))
# A machine full of devices with their drivers, and what each does in a run: the
# machine with one of them at work runs against the same with none.
BUSY = Shape('q35 with devices', args='''-nodefaults
    -drive if=none,id=vda,format=raw,snapshot=on,file=DISK
    -device virtio-blk-pci,drive=vda
    -drive if=none,id=sda,format=raw,snapshot=on,file=DISK
    -device virtio-scsi-pci,id=scsi -device scsi-hd,drive=sda,bus=scsi.0
    -drive if=none,id=cd,media=cdrom,readonly=on,file=DISK,format=raw
    -device ide-cd,drive=cd,bus=ide.0
    -drive if=none,id=usb,format=raw,readonly=on,file=DISK
    -device qemu-xhci,id=xhci -device usb-storage,bus=xhci.0,drive=usb
    -drive if=none,id=nvme,format=raw,snapshot=on,file=DISK
    -device nvme,serial=1,drive=nvme
    -netdev user,id=n0 -device virtio-net-pci,netdev=n0
    -netdev user,id=n1 -device e1000e,netdev=n1
    -netdev user,id=n2 -device rtl8139,netdev=n2
    -device virtio-rng-pci
    -chardev null,id=null -device virtio-serial-pci
    -device virtconsole,chardev=null
    -device virtio-vga''',
             drivers='virtio_pci,virtio_blk,virtio_scsi,sd_mod,ahci,sr_mod,'
             'virtio_net,e1000e,8139cp,nvme,virtio-rng,virtio_console,'
             'virtio-gpu,xhci-pci,usb-storage')
TASKS = {
    'virtio-blk': 'read /dev/vda',
    'virtio-blk, written to': 'write /dev/vda',
    'virtio-scsi, scsi-hd': 'read /dev/sda',
    'AHCI, ide-cd': 'read /dev/sr0',
    'nvme': 'read /dev/nvme0n1',
    'nvme, written to': 'write /dev/nvme0n1',
    'qemu-xhci, usb-storage': 'read /dev/sdb',
    'virtio-net': 'send eth0',
    'e1000e': 'send eth1',
    'rtl8139': 'send eth2',
    'virtio-rng': 'read /dev/hwrng',
    'virtio-serial, virtconsole': 'write /dev/hvc0',
    'virtio-vga': 'write /dev/fb0',
}

DISK = '-nodefaults -drive if=virtio,format=raw,file=DISK'
DISKS = (Shape('a disk, read-only', args=f'{DISK},readonly=on', guest='bare'),
         Shape('a disk, writable', args=f'{DISK},snapshot=on', guest='bare'))

GROUPS = PC, Q35, UEFI, DRIVERS, KVM, BEFORE, DISKS

# What system calls are counted of
CALLS = (Shape('TCG, bare', 'pc', '-nodefaults', 'bare'),
         Shape('TCG, default q35', args=''),
         Shape('TCG, bare, -smp 2, virtio', 'pc', '-nodefaults ' + VIRTIO,
               'bare', smp=2), KVM[0],
         # Each of its restores maps RAM: that there are calls to be counted
         Shape('TCG, bare, ram=remap', 'pc', '-nodefaults', 'bare',
               options='ram=remap'))


# For a while as long as "make check" has
SELF_TEST_DEVICES = 'e1000', 'edu'


def missing(shape, bench):
    """Why it cannot be measured, or None"""
    if 'CODE' in shape.args and not (CODE.exists() and VARS.exists()):
        return f'there is no {CODE}; run: apt-get install ovmf'
    if shape.before and not bench.before:
        return 'no older binary was given: make bench BEFORE=path'
    return kvm_missing() if shape.accel == 'kvm' else None


def bare(group):
    """The same machines with the guest that starts at once"""
    return tuple(dataclasses.replace(s, guest='bare', drivers='')
                 for s in group)

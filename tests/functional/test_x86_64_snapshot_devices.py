#!/usr/bin/env python3
#
# Functional test of the devices that the snapshot device restores, or refuses
#
# SPDX-License-Identifier: GPL-2.0-or-later

from array import array
from dataclasses import dataclass, replace
import itertools
import json
import os
from pathlib import Path
import random
import re
import shutil
import socket
import subprocess
import textwrap
import threading
import time

from qemu_test import QemuSystemTest, skipSlowTest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / 'docs/system/devices/snapshot-devices.rst.inc'


TABLE_HEAD = '''\
..
   SPDX-License-Identifier: GPL-2.0-or-later
   Made by a run of the test; see docs/devel/snapshot-testing.rst.

.. list-table::
   :header-rows: 1
   :widths: 30 45 25

   * - Device
     - After a restore
     - What the guest did
'''


def table_row(*columns):
    """As docs/system/devices/snapshot-devices.rst.inc has it"""
    return ''.join(
        textwrap.fill(text, width=78, subsequent_indent=' ' * 7,
                      initial_indent='     - ' if i else '   * - ',
                      break_long_words=False, break_on_hyphens=False) + '\n'
        for i, text in enumerate(columns))


# Rows of what no guest drives begin so in their last column.
OTHERS = re.compile(r'^     - (random accesses|no access)', re.M)


CPU = '-x86_64-cpu'


def drivers_of(args):
    """The devices that arguments of QEMU name"""
    return set(re.findall(r'-device ([^, ]+)', args))


def table_rows():
    """What the manual has, by the first column"""
    rows = re.findall(r'^   \* - (?:.|\n)*?(?=^   \* - |\Z)',
                      TABLE.read_text(), re.M)
    return {' '.join(r.split('\n     - ')[0].split()[2:]): r for r in rows[1:]}


@dataclass
class Device:
    """
    A row of the table. What the guest does with it are tasks of
    tests/functional/snapshot-linux/devices.c, by the drivers named.
    """
    name: str
    args: str
    drivers: str
    tasks: str
    does: str
    caveat: str = ''


def words(base, count):
    """What devices.c expects a disk, or a stream, to consist of"""
    golden, mask = 0x9e3779b97f4a7c15, (1 << 64) - 1
    return array('Q', ((base + i) * golden & mask for i in range(count)))


class Host:
    """
    What the guest's devices talk to: a UDP and a TCP server, and a listener
    that sends back all it gets.
    """

    def __init__(self, directory):
        self.stream = words(0, 32768).tobytes()
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(('127.0.0.1', 0))
        self.port = self.udp.getsockname()[1]
        self.tcp = socket.create_server(('127.0.0.1', self.port))
        self.echo = socket.socket(socket.AF_UNIX)
        self.echo_path = os.path.join(directory, 'echo')
        self.echo.bind(self.echo_path)
        self.echo.listen()
        self.run(self.serve_udp)
        self.run(self.accept, self.tcp, self.send_stream)
        self.run(self.accept, self.echo, self.send_back)

    @staticmethod
    def run(function, *args):
        threading.Thread(target=function, args=args, daemon=True).start()

    def close(self):
        for s in self.udp, self.tcp, self.echo:
            s.close()

    def serve_udp(self):
        try:
            while True:
                self.udp.sendto(*self.udp.recvfrom(2048))
        except OSError:
            pass

    def accept(self, listener, serve):
        try:
            while True:
                self.run(serve, listener.accept()[0])
        except OSError:
            pass

    def send_stream(self, connection):
        try:
            with connection:
                connection.sendall(self.stream)
        except OSError:
            pass

    @staticmethod
    def send_back(connection):
        try:
            with connection:
                while data := connection.recv(4096):
                    connection.sendall(data)
        except OSError:
            pass


def network(n, model):
    """The nth network card, ethN, at a network of its own, 10.N.0.0"""
    return (f'-netdev user,id=n{n},net=10.{n}.0.0/24 '
            f'-device {model},netdev=n{n}')


def network_tasks(n):
    return f'udp=eth{n}:PORT tcp=eth{n}:PORT'


DISK = '-drive if=none,id={},format=raw,file=DISK,'
CONNECTIONS = 'connections break'
PACKETS = 'UDP echoes and TCP downloads'
READS = 'random reads, four at a time'
CONTENT = 'the content does not go back'

VIRTIO = (
    Device('virtio-blk',
           DISK.format('vda') + 'readonly=on -device virtio-blk-pci,drive=vda',
           'virtio_blk', 'disk=/dev/vda', READS, CONTENT),
    Device('virtio-scsi, scsi-hd',
           DISK.format('sda') + 'readonly=on -device virtio-scsi-pci,id=vs '
           '-device scsi-hd,bus=vs.0,drive=sda',
           'virtio_scsi,sd_mod', 'disk=/dev/sda', READS, CONTENT),
    Device('virtio-net', network(0, 'virtio-net-pci'), 'virtio_net',
           network_tasks(0), PACKETS, CONNECTIONS),
    Device('virtio-rng', '-device virtio-rng-pci', 'virtio-rng',
           'rng=/dev/hwrng', 'reads of random numbers'),
    Device('virtio-serial, virtserialport',
           '-chardev socket,id=echo,path=ECHO -device virtio-serial-pci,id=ser '
           '-device virtserialport,bus=ser.0,chardev=echo',
           'virtio_console', 'serial=/dev/vport*p1', 'echoes',
           'what was on its way is lost'),
    Device('virtio-balloon', '-device virtio-balloon-pci', 'virtio_balloon',
           'balloon=meminfo', 'its size going up and down'),
    Device('virtio-tablet', '-device virtio-tablet-pci', 'virtio_input,evdev',
           'input=QEMU_Virtio_Tablet', 'movements'),
    Device('virtio-vga', '-device virtio-vga', 'virtio-gpu',
           'screen=/dev/fb0', 'painting'),
)

Q35 = (
    Device('AHCI, ide-hd',
           DISK.format('ide') + 'snapshot=on -device ide-hd,drive=ide',
           'ahci,sd_mod', 'disk=/dev/sda', READS, CONTENT),
    Device('e1000e', network(0, 'e1000e'), 'e1000e', network_tasks(0), PACKETS,
           CONNECTIONS),
    Device('qemu-xhci, usb-storage',
           '-device qemu-xhci,id=xhci ' + DISK.format('usb') +
           'readonly=on -device usb-storage,bus=xhci.0,drive=usb',
           'xhci-pci,usb-storage', 'disk=/dev/sdb', READS, CONTENT),
    Device('usb-tablet', '-device usb-tablet,bus=xhci.0',
           'usbhid,hid-generic,evdev', 'input=QEMU_QEMU_USB_Tablet',
           'movements'),
    Device('intel-hda, hda-duplex',
           '-audiodev none,id=a -device intel-hda '
           '-device hda-duplex,audiodev=a',
           'snd-hda-intel,snd-hda-codec-generic,snd-pcm-oss',
           'sound=/dev/dsp:snd-hda-intel', 'playing and recording'),
    Device('VGA', '-vga std', 'bochs', 'screen=/dev/fb0', 'painting'),
    Device('ICH9 SMBus, smbus-eeprom', '', 'i2c-i801,i2c-dev', 'smbus=SMBus',
           'writes and reads'),
)

PC = (
    Device('PIIX IDE, ide-hd',
           DISK.format('ide') + 'snapshot=on -device ide-hd,drive=ide',
           'ata_piix,sd_mod', 'disk=/dev/sda', READS, CONTENT),
    Device('e1000', network(0, 'e1000'), 'e1000', network_tasks(0), PACKETS,
           CONNECTIONS),
    Device('rtl8139', network(1, 'rtl8139'), '8139cp', network_tasks(1),
           PACKETS, CONNECTIONS),
    Device('lsi53c895a, scsi-hd',
           DISK.format('lsi') + 'readonly=on -device lsi53c895a,id=lsi '
           '-device scsi-hd,bus=lsi.0,drive=lsi',
           'sym53c8xx', 'disk=/dev/sdb', READS, CONTENT),
    Device('UHCI, usb-tablet', '-usb -device usb-tablet',
           'uhci-hcd,usbhid,hid-generic,evdev', 'input=QEMU_QEMU_USB_Tablet',
           'movements'),
    Device('AC97', '-audiodev none,id=a -device AC97,audiodev=a',
           'snd-intel8x0,snd-pcm-oss', 'sound=/dev/dsp:snd-intel8x0',
           'playing and recording'),
    Device('cirrus-vga', '-vga cirrus', 'cirrus', 'screen=/dev/fb0',
           'painting'),
    Device('PIIX4 SMBus, smbus-eeprom', '', 'i2c-piix4,i2c-dev', 'smbus=SMBus',
           'writes and reads'),
)


def scsi(controller, device='scsi-hd'):
    name = f'{controller}-{device}'
    return (DISK.format(name) + f'readonly=on -device {controller},id={name} '
            f'-device {device},bus={name}.0,drive={name}')


def usb(controller):
    return (DISK.format(controller) + f'readonly=on -device {controller},'
            f'id={controller} -device usb-storage,bus={controller}.0,'
            f'drive={controller}')


PC_MORE = (
    Device('megasas, scsi-hd', scsi('megasas'), 'megaraid_sas,sd_mod',
           'disk=/dev/sda', READS, CONTENT),
    Device('PIIX IDE, ide-cd', DISK.format('cd') + 'readonly=on,media=cdrom '
           '-device ide-cd,drive=cd', 'ata_piix,sr_mod', 'disk=/dev/sr0',
           READS, CONTENT),
    Device('PS/2 keyboard', '', 'evdev', 'input=AT_Translated', 'keys'),
    Device('PS/2 mouse', '', 'psmouse,evdev', 'input=ImExPS/2', 'movements'),
)

Q35_DISKS = (
    Device('megasas-gen2, scsi-hd', scsi('megasas-gen2'),
           'megaraid_sas,sd_mod', 'disk=/dev/sda', READS, CONTENT),
    Device('virtio-scsi, scsi-cd', scsi('virtio-scsi-pci', 'scsi-cd'),
           'virtio_scsi,sr_mod', 'disk=/dev/sr0', READS, CONTENT),
    Device('usb-ehci, usb-storage', usb('usb-ehci'),
           'ehci-pci,usb-storage,sd_mod', 'disk=/dev/sdb', READS, CONTENT),
    Device('pci-ohci, usb-storage', usb('pci-ohci'),
           'ohci-pci,usb-storage,sd_mod', 'disk=/dev/sdc', READS, CONTENT),
    Device('nec-usb-xhci, usb-hub, usb-storage', '-device nec-usb-xhci,id=nec '
           '-device usb-hub,bus=nec.0,port=1 ' + DISK.format('hub') +
           'readonly=on -device usb-storage,bus=nec.0,port=1.1,drive=hub',
           'xhci-pci,usb-storage,sd_mod', 'disk=/dev/sdd', READS, CONTENT),
    Device('usb-kbd', '-device usb-kbd,bus=nec.0,port=1.2',
           'usbhid,hid-generic,evdev', 'input=QEMU_QEMU_USB_Keyboard', 'keys'),
    Device('usb-mouse', '-device usb-mouse,bus=nec.0,port=1.3',
           'usbhid,hid-generic,evdev', 'input=QEMU_QEMU_USB_Mouse',
           'movements'),
)

PC_NETS = (
    Device('pcnet', network(0, 'pcnet'), 'pcnet32', 'udp=eth0:PORT',
           'UDP echoes', CONNECTIONS),
    Device('ne2k_pci', network(1, 'ne2k_pci'), 'ne2k-pci', 'udp=eth1:PORT',
           'UDP echoes', CONNECTIONS),
    Device('tulip', network(2, 'tulip'), 'tulip', network_tasks(2), PACKETS,
           CONNECTIONS),
    Device('vmxnet3', network(3, 'vmxnet3'), 'vmxnet3', network_tasks(3),
           PACKETS, CONNECTIONS),
    Device('i82559c', network(4, 'i82559c'), 'e100', network_tasks(4), PACKETS,
           CONNECTIONS),
    Device('i82550', network(5, 'i82550'), 'e100', network_tasks(5), PACKETS,
           CONNECTIONS),
    Device('e1000-82545em', network(6, 'e1000-82545em'), 'e1000',
           network_tasks(6), PACKETS, CONNECTIONS),
)

# Some of them behind bridges
Q35_MORE = (
    Device('pcie-root-port, igb',
           '-device pcie-root-port,id=root,chassis=1 ' +
           network(0, 'igb,bus=root'), 'igb', network_tasks(0), PACKETS,
           CONNECTIONS),
    Device('x3130-upstream, xio3130-downstream, virtio-mouse',
           '-device pcie-root-port,id=root2,chassis=2 '
           '-device x3130-upstream,id=up,bus=root2 '
           '-device xio3130-downstream,id=down,bus=up,chassis=3 '
           '-device virtio-mouse-pci,bus=down', 'virtio_input,evdev',
           'input=QEMU_Virtio_Mouse', 'movements'),
    Device('virtio-keyboard', '-device virtio-keyboard-pci',
           'virtio_input,evdev', 'input=QEMU_Virtio_Keyboard', 'keys'),
    Device('bochs-display', '-device bochs-display', 'bochs',
           'screen=/dev/fb0', 'painting'),
    Device('ich9-intel-hda, hda-output', '-audiodev none,id=a '
           '-device ich9-intel-hda -device hda-output,audiodev=a',
           'snd-hda-intel,snd-hda-codec-generic,snd-pcm-oss',
           'sound=/dev/dsp:+snd-hda-intel', 'playing'),
    Device('pcie-pci-bridge, i6300esb',
           '-device pcie-pci-bridge,id=old,bus=pcie.0 '
           '-device i6300esb,bus=old', 'i6300esb', 'watchdog=/dev/watchdog0',
           'keeping it quiet'),
    Device('virtio-serial, virtconsole',
           '-chardev socket,id=echo,path=ECHO -device virtio-serial-pci,id=ser '
           '-device virtconsole,bus=ser.0,chardev=echo',
           'virtio_console', 'serial=/dev/hvc0', 'echoes',
           'what was on its way is lost'),
)


# With memory that the process of the back end maps
VHOST = (
    Device('vhost-user-blk', '-machine memory-backend=ram '
           '-object memory-backend-memfd,id=ram,size=256M,share=on '
           '-chardev socket,id=vhost,path=VHOST '
           '-device vhost-user-blk-pci,chardev=vhost', 'virtio_blk',
           'disk=/dev/vda', READS, CONTENT),
)
VHOST_DIRTY = (replace(VHOST[0], name='vhost-user-blk, ram=dirty'),)

TPM = (
    Device('tpm-tis, ppi=off', '-chardev socket,id=tpm,path=SWTPM '
           '-tpmdev emulator,id=tpm0,chardev=tpm '
           '-device tpm-tis,tpmdev=tpm0,ppi=off', 'tpm_tis', 'tpm=/dev/tpm0',
           'extending a register', 'its clock runs on'),
)
TPM_PPI = (replace(TPM[0], name='tpm-tis',
                   args=TPM[0].args.replace(',ppi=off', '')),)

EXPORT = (
    Device('virtio-9p', '-virtfs local,path=/etc,mount_tag=etc,readonly=on,'
           'security_model=none', '9p,9pnet_virtio', 'export=etc:passwd',
           'looks at a file'),
)

# QEMU does not save them, but for our patches.
PATCHED = (
    Device('usb-net', '-device qemu-xhci,id=xhci ' +
           # Not a local address, or the driver does not call it eth0
           network(0, 'usb-net,bus=xhci.0,mac=40:00:00:00:00:01'),
           'xhci-pci,cdc_ether', network_tasks(0), PACKETS, CONNECTIONS),
    Device('usb-serial', '-chardev socket,id=echo,path=ECHO '
           '-device usb-serial,bus=xhci.0,chardev=echo', 'ftdi_sio',
           'serial=/dev/ttyUSB0', 'echoes', 'what was on its way is lost'),
    Device('nvme, nvme-ns', DISK.format('nvme1') + 'snapshot=on ' +
           DISK.format('nvme2') + 'snapshot=on -device nvme,id=nvme,serial=1 '
           '-device nvme-ns,bus=nvme,drive=nvme1 '
           '-device nvme-ns,bus=nvme,drive=nvme2', 'nvme',
           'disk=/dev/nvme0n1 disk=/dev/nvme0n2', READS, CONTENT),
    Device('virtio-crypto', '-object cryptodev-backend-builtin,id=c '
           '-device virtio-crypto-pci,cryptodev=c',
           'virtio_crypto,algif_skcipher', 'crypto=cbc',
           'encrypting and decrypting'),
)

EDU = (
    Device('edu', '-device edu,addr=0x10', '',
           'register=/sys/bus/pci/devices/0000:00:10.0/resource0:4',
           'writes to a register'),
)

# What the machine is refused for, asked right after it was made
REFUSED = {
    'nvme, cmb_size_mb=1': '-device nvme,serial=1,cmb_size_mb=1',
    'ufs': '-device ufs',
    'rocker': '-device rocker,name=r',
    'usb-audio': '-audiodev none,id=a -device qemu-xhci '
                 '-device usb-audio,audiodev=a',
    'usb-uas': '-device qemu-xhci -device usb-uas',
    'usb-mtp': '-device qemu-xhci -device usb-mtp,rootdir=/tmp',
    'usb-wacom-tablet': '-device qemu-xhci -device usb-wacom-tablet',
    'amd-iommu': '-device amd-iommu',
    'ivshmem-plain': '-object memory-backend-ram,id=m,size=1M,share=on '
                     '-device ivshmem-plain,memdev=m',
    'virtio-mem': '-m 64,maxmem=1G '
                  '-object memory-backend-ram,id=m,size=64M '
                  '-device virtio-mem-pci,memdev=m',
}

ALL = (VIRTIO + Q35 + PC + PC_MORE + Q35_DISKS + PC_NETS + Q35_MORE + VHOST +
       TPM + PATCHED + EDU + VHOST_DIRTY + TPM_PPI + EXPORT)


def told_by_hand():
    """The devices that ALL or REFUSED has"""
    return set().union(*(drivers_of(d.args) for d in ALL),
                       *(d.name.split(', ') for d in ALL),
                       *map(drivers_of, REFUSED.values()), REFUSED)


class SnapshotDevices(QemuSystemTest):
    """
    A Linux guest keeps devices busy while the host saves and restores it at
    any moment. Each restore is verified, byte for byte, and after each one
    every device has to work on. scripts/linux-guest makes the guest.
    """

    rows = {}                   # of the table that is being made
    others = False              # Those that OTHERS finds are, too.

    SAVES = 4
    RESTORES = 6                # of each

    def setUp(self):
        super().setUp()
        # Seeded, so that a failure has a chance to come back
        self.rng = random.Random(1)
        self.host = Host(self.socket_dir().name)
        self.serial = Path(self.log_file('serial.log'))
        self.found = []
        self.is_down = False

    def tearDown(self):
        self.host.close()
        super().tearDown()

    @classmethod
    def tearDownClass(cls):
        if os.getenv('QEMU_TEST_SNAPSHOT_TABLE'):
            rows = table_rows()
            if cls.others:
                rows = {n: r for n, r in rows.items() if not OTHERS.search(r)}
            rows |= cls.rows
            names = [d.name for d in ALL] + list(REFUSED)
            names += [n for n, r in rows.items() if OTHERS.search(r)]
            TABLE.write_text(TABLE_HEAD + ''.join(
                rows[n] for n in names if n in rows))

    def serve(self, *command):
        """Run a device's back end, which makes the socket SOCKET."""
        path = os.path.join(self.socket_dir().name,
                            os.path.basename(command[0]))
        if not shutil.which(command[0]):
            self.skipTest(f'there is no {command[0]}')
        process = subprocess.Popen([a.replace('SOCKET', path)
                                    for a in command])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        end = time.monotonic() + 60
        while not os.path.exists(path):
            self.assertIsNone(process.poll(), f'{command[0]} ended')
            self.assertLess(time.monotonic(), end, f'no {path}')
            time.sleep(0.01)
        return path

    def serve_disk(self, disk):
        return self.serve(
            self.build_file('storage-daemon', 'qemu-storage-daemon'),
            '--blockdev', f'file,node-name=f,filename={disk},read-only=on',
            # So slow that there is always a request under way
            '--object', 'throttle-group,id=t,limits.iops-total=500',
            '--blockdev', 'throttle,node-name=slow,throttle-group=t,file=f,'
            'read-only=on',
            '--export', 'vhost-user-blk,id=e,node-name=slow,writable=off,'
            'addr.type=unix,addr.path=SOCKET')

    def serve_tpm(self):
        state = self.scratch_file('tpm')
        os.mkdir(state)
        return self.serve('swtpm', 'socket', '--tpm2', '--tpmstate',
                          f'dir={state}', '--ctrl', 'type=unixio,path=SOCKET')

    def boot(self, machine, devices, *args, irq='msi'):
        linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX',
                               ROOT / 'build/linux')) / 'drivers'
        if not (linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {linux}: '
                          'run scripts/linux-guest --drivers')
        self.require_device('name "snapshot"')
        self.require_netdev('user')
        disk = self.scratch_file('disk')
        Path(disk).write_bytes(words(0, 1 << 20).tobytes())
        self.serial.unlink(missing_ok=True)
        line = os.path.join(self.socket_dir().name, 'line')

        places = {'DISK': disk, 'ECHO': self.host.echo_path,
                  'PORT': str(self.host.port)}
        if any('VHOST' in d.args for d in devices):
            places['VHOST'] = self.serve_disk(disk)
        if any('SWTPM' in d.args for d in devices):
            places['SWTPM'] = self.serve_tpm()

        def fill_in(text):
            for name, place in places.items():
                text = text.replace(name, place)
            return text

        drivers = ['virtio_pci'] + [d.drivers for d in devices if d.drivers]
        self.tasks = [(d, t) for d in devices for t in d.tasks.split()]
        run = ','.join(['devices'] + [fill_in(t) for _, t in self.tasks])
        for d in devices:
            self.vm.add_args(*fill_in(d.args).split())
        self.vm.set_machine(machine)
        self.vm.add_args('-nodefaults', '-accel', 'tcg', '-m', '256',
                         '-rtc', 'clock=vm', '-no-reboot',
                         '-serial', f'file:{self.serial}',
                         '-chardev', f'socket,id=line,path={line},server=on,'
                                     'wait=off',
                         '-serial', 'chardev:line',
                         '-kernel', str(linux / 'vmlinuz'),
                         '-initrd', str(linux / 'initramfs'),
                         # Or it changes the cards' set-up in its own time
                         '-append', 'console=ttyS0 panic=-1 quiet '
                         'ipv6.disable=1 ' +
                         ('pci=nomsi ' if irq == 'intx' else '') +
                         f'no_timer_check snapshot.modules={",".join(drivers)} '
                         f'snapshot.run={run}', *args)
        self.vm.launch()
        self.line = socket.socket(socket.AF_UNIX)
        self.line.settimeout(60)
        self.line.connect(line)
        self.answers = self.line.makefile('r')
        self.token = 0

    def output(self):
        return self.serial.read_text(errors='replace')[-1500:]

    def rounds(self):
        """How many rounds each task has gone; a string if it failed"""
        self.token += 1
        self.line.sendall(f'{self.token}\n'.encode())
        token, *answers = self.answers.readline().rstrip('\n').split(';')
        self.assertEqual(token, str(self.token), self.output())
        self.assertEqual(len(answers), len(self.tasks))
        return [int(a) if a.isdecimal() else a for a in answers]

    def disturb(self):
        """What comes from outside"""
        names = [d.name for d, _ in self.tasks]
        events = []
        for kind, word in ('abs', 'tablet'), ('rel', 'mouse'):
            if any(word in n for n in names):
                events += [
                    {'type': kind, 'data': {'axis': axis, 'value': value}}
                    for axis in ('x', 'y')
                    for value in [self.rng.randrange(32768 if kind == 'abs'
                                                     else 100)]]
        if any('keyboard' in n or 'kbd' in n for n in names):
            self.is_down = not self.is_down
            events.append({'type': 'key', 'data': {
                'down': self.is_down,
                'key': {'type': 'qcode', 'data': 'shift'}}})
        if events:
            self.vm.cmd('input-send-event', events=events)
        if 'virtio-balloon' in names:
            self.vm.cmd('balloon',
                        value=self.rng.randrange(208, 240, 2) << 20)

    def wait_for_progress(self, timeout=60):
        """Each task goes on, or has told that it failed."""
        end = time.monotonic() + timeout
        first = now = self.rounds()
        while (idle := [t for (_, t), a, b in zip(self.tasks, first, now)
                        if isinstance(b, int) and b <= a]):
            self.assertLess(time.monotonic(), end, f'does not go on: {idle}')
            self.disturb()
            time.sleep(0.02)
            now = self.rounds()
        return now

    def wait_for_start(self):
        end = time.monotonic() + 300
        while 'devices: go' not in self.output().split('\n'):
            self.assertLess(time.monotonic(), end, self.output())
            self.assertTrue(self.vm.is_running(), self.output())
            time.sleep(0.1)
        self.log.info('the guest runs')
        self.wait_for_progress(300)

    def screen(self):
        if not any(t.startswith('screen=') for _, t in self.tasks):
            return None
        path = self.scratch_file('screen')
        self.vm.cmd('screendump', filename=path)
        return Path(path).read_bytes()

    def load(self, machine, devices, *args, ram='dirty', irq='msi'):
        self.boot(machine, devices, '-device',
                  f'snapshot,ram={ram},verify=on,disks=keep',
                  *args, irq=irq)
        self.wait_for_start()
        for save in range(self.SAVES):
            time.sleep(self.rng.uniform(0, 0.1))
            self.disturb()
            self.vm.cmd('stop')
            screen = self.screen()
            self.vm.cmd('x-snapshot-device-save', slot=save)
            self.vm.cmd('cont')
            for i in range(self.RESTORES):
                now = self.wait_for_progress()
                time.sleep(self.rng.uniform(0, 0.1))
                # Into a machine that runs, and one that does not
                if i % 2:
                    self.vm.cmd('x-snapshot-device-restore', slot=save)
                    continue
                self.vm.cmd('stop')
                self.vm.cmd('x-snapshot-device-restore', slot=save)
                self.assertTrue(self.screen() == screen, 'another screen')
                self.vm.cmd('cont')
        now = self.wait_for_progress()
        info = self.vm.cmd('x-query-snapshot-device')
        self.assertEqual(info['verified'], self.SAVES * self.RESTORES)
        self.line.sendall(b'stop\n')
        self.vm.wait(timeout=60)
        self.log.info('rounds: %s', list(zip([t for _, t in self.tasks], now)))
        self.report(devices, now, info)
        self.check_rows()

    def report(self, devices, rounds, info):
        found = info['mismatches']
        self.assertEqual(info['mismatched'], 0, found['ram'] + sorted(
            {d['section'] + ' ' + d['field'] for d in found['devices']}))
        for device in devices:
            result = 'exact' + (device.caveat and f'; {device.caveat}')
            for (d, _), r in zip(self.tasks, rounds):
                if d is device and isinstance(r, str):
                    result = ('not put back, with a warning: ' +
                              r.removeprefix('FAILED '))
            # What is not put back, and only that, is named.
            self.assertEqual('not put back' in result,
                             any(u.split()[0] in device.name.split(', ')
                                 for u in info['unsaved']), info['unsaved'])
            self.tell(device.name, result, device.does)

    # The table

    def tell(self, name, result, does):
        self.found.append((name, result, does))
        self.log.info('%s: %s', name, result)

    def check_rows(self):
        """What was found is what the manual says, unless it is being made."""
        Path(self.log_file('devices.json')).write_text(
            json.dumps(self.found, indent=1))
        if os.getenv('QEMU_TEST_SNAPSHOT_TABLE'):
            self.rows.update({row[0]: table_row(*row) for row in self.found})
            return
        text = TABLE.read_text()
        for name, *row in self.found:
            self.assertIn(table_row(name, *row), text,
                          'the manual says something else')

    # Under load

    def test_vhost(self):
        self.load('q35', VHOST, ram='remap')

    def test_tpm(self):
        self.load('q35', TPM)

    def test_virtio_in_place(self):
        """
        The guest restores itself. Catches a virtio device that hangs, because
        its queues were put back without it, and one that is reset each time.
        """
        restores = 100
        devices = [d for d in VIRTIO if d.name.startswith(
                       ('virtio-blk', 'virtio-net', 'virtio-rng',
                        'virtio-serial'))]
        devices.append(Device('restore', '', '', f'restore={restores}', ''))
        self.boot('q35', devices, '-smp', '2',
                  '-device', 'snapshot,ram=dirty,verify=10')
        end = time.monotonic() + 600
        while (info := self.vm.cmd('x-query-snapshot-device')
               )['restores'] < restores and time.monotonic() < end:
            time.sleep(1)
        now = self.wait_for_progress()
        self.assertEqual(info['restores'], restores, (now, self.output()))
        self.assertEqual([r for r in now if isinstance(r, str)], [])
        self.assertEqual(info['mismatched'], 0, info['mismatches'])
        resets = info['device-resets'] + info['machine-resets']
        self.log.info('%d resets', resets)
        # A packet that waits for the main loop to be sent may need one
        self.assertLess(resets, restores // 10, info.get('reset-reason'))

    def test_idle_beside(self):
        """
        A device whose registers are less than a page is used, and one that is
        reset if it was accessed is not. Catches accesses that count as those
        to any device.
        """
        restores = 50
        trace = self.scratch_file('trace')
        devices = (Device('rtl8139', network(0, 'rtl8139'), '8139cp',
                          network_tasks(0), ''),
                   Device('idle', '-device qemu-xhci', '', '', ''),
                   Device('restore', '', '', f'restore={restores}', ''))
        self.boot('pc', devices, '-device', 'snapshot,ram=dirty', '-D', trace,
                  '-trace', 'qemu_device_state_reset')
        end = time.monotonic() + 120
        while (self.vm.cmd('x-query-snapshot-device')['restores'] < restores
               and time.monotonic() < end):
            time.sleep(0.5)
        self.assertGreaterEqual(
            self.vm.cmd('x-query-snapshot-device')['restores'], restores)
        resets = re.findall(r'reset .*/([^/:]+): was accessed',
                            Path(trace).read_text())
        self.assertIn('rtl8139', resets)
        self.assertNotIn('xhci', resets)

    # Refused

    def refuse(self, vm, name, does):
        reply = vm.qmp('x-snapshot-device-save', slot=0)
        self.assertEqual(vm.cmd('x-query-snapshot-device')['saved'], [])
        self.tell(name, 'refused: ' + reply['error']['desc'], does)

    def refuse_running(self, devices, ram='auto'):
        device, = devices
        self.boot('q35', devices, '-device', f'snapshot,ram={ram}')
        self.wait_for_start()
        self.refuse(self.vm, device.name, device.does)
        self.check_rows()

    def test_vhost_dirty(self):
        self.refuse_running(VHOST_DIRTY, 'dirty')

    def test_tpm_ppi(self):
        self.refuse_running(TPM_PPI)

    def test_export(self):
        self.refuse_running(EXPORT)

    def test_refused(self):
        self.require_device('name "snapshot"')
        for name, args in REFUSED.items():
            vm = self.get_vm(name=name)
            vm.set_machine('q35')
            vm.add_args('-nodefaults', '-accel', 'tcg', '-S',
                        '-device', 'snapshot', *args.split())
            vm.launch()
            self.refuse(vm, name, 'nothing yet')
            vm.shutdown()
        self.check_rows()

    @skipSlowTest()
    def test_others(self):
        """
        What no guest drives gets random accesses, from snapshot-any-test: all
        its devices, by what became of them.
        """
        self.add_others(self.run_any())

    def run_any(self):
        program = self.build_file('tests', 'qtest', 'snapshot-any-test')
        if not os.access(program, os.X_OK):
            self.skipTest(f'there is no {program}')
        env = os.environ | {'QTEST_QEMU_BINARY': self.qemu_bin}
        with open(self.log_file('any.log'), 'w') as log:
            return subprocess.run([program, '--tap', '-k'], env=env, text=True,
                                  check=True, stdout=subprocess.PIPE,
                                  stderr=log).stdout

    def add_others(self, text):
        """Make rows of what snapshot-any-test said."""
        self.assertNotIn('\nnot ok', text)
        known = told_by_hand()
        tested, reasons = set(), {}
        stateless = set(re.findall(r'^# not put back, with a warning: (.*)',
                                   text, re.M))
        for name, why in re.findall(r'^ok \d+ /\w+/snapshot/any/[^/\n]+/\w+/'
                                    r'(\S+)(?: # SKIP (.*))?$', text, re.M):
            if why:
                # Without what differs from device to device
                why = re.sub(r'^\S*qemu-system-\S+: |-device \S+: '
                             r"| for device '[^']*'", '', why)
                why = re.sub(r"'[^' ]*/([^/' ]+)'", r"'\1'", why)
                if why.startswith('# '):
                    why = 'QEMU ends and says nothing'
                reasons.setdefault(name, why.strip())
            else:
                tested.add(name)
        parts = re.findall(r'^# not on its own: ([^:]+): ', text, re.M)
        groups = {}
        for name in sorted((tested | set(reasons)) - known - {'default'}):
            if name not in tested:
                why = reasons[name]
                save = 'the save is refused: '
                result = ('refused: ' + why.removeprefix(save)
                          if why.startswith(save) else
                          'cannot be started alone: ' + why)
                key = result, 'no access'
            elif name in stateless:
                key = ('not put back, with a warning: keeps the state that it '
                       'has'), 'random accesses'
            else:
                key = 'exact', 'random accesses'
            if name.endswith(CPU):
                name = name.removesuffix(CPU)
                key = key[0], key[1] + ', as a second processor'
            groups.setdefault(key, []).append(name)
        groups[('not to be added by a user; what pc, q35 and microvm have of '
                'these is exact', 'random accesses to the machine')] = parts
        type(self).others = True
        for (result, does), names in groups.items():
            self.tell(', '.join(names), result, does)
        self.check_rows()

    def test_table(self):
        """
        The manual tells of no device that was not tried, and of each that QEMU
        has.
        """
        if os.getenv('QEMU_TEST_SNAPSHOT_TABLE'):
            self.skipTest('the table is being made')
        rows = table_rows()
        names = [d.name for d in ALL] + list(REFUSED)
        self.assertEqual([n for n, r in rows.items() if not OTHERS.search(r)],
                         names)
        told = told_by_hand().union(*(n.split(', ') for n in rows))
        vm = self.get_vm(name='none')
        vm.set_machine('none')
        vm.add_args('-nodefaults')
        vm.launch()
        types = vm.cmd('qom-list-types', abstract=False, implements='device')
        found = {t['name'].removesuffix(CPU) for t in types}
        vm.shutdown()
        self.assertIn('virtio-blk-pci', found)
        self.assertEqual(found - told - {'snapshot'}, set(),
                         'the manual tells nothing of these: run '
                         'QEMU_TEST_SNAPSHOT_TABLE=1 FULL=1 '
                         'scripts/check test_x86_64_snapshot_devices')


# Under load: the machine, its devices, and arguments of QEMU
LOADS = {
    'virtio': ('q35', VIRTIO, '-smp', '2'),
    'q35': ('q35', Q35),
    'pc': ('pc', PC + EDU),
    'pc_more': ('pc', PC_MORE),
    'q35_disks': ('q35', Q35_DISKS),
    'pc_nets': ('pc', PC_NETS),
    'q35_more': ('q35', Q35_MORE),
    'patched': ('q35', PATCHED),
}

# The others are only run with QEMU_TEST_ALLOW_SLOW.
SHORT = ('virtio_dirty_msi', 'virtio_dirty_intx', 'q35_dirty_msi',
         'pc_dirty_intx', 'patched_dirty_msi')


def add_load(name, ram, irq):
    """Add a test of what LOADS has by that name."""
    def test(self):
        machine, devices, *args = LOADS[name]
        self.load(machine, devices, *args, ram=ram, irq=irq)

    full_name = f'{name}_{ram}_{irq}'
    if full_name not in SHORT:
        test = skipSlowTest()(test)
    setattr(SnapshotDevices, f'test_{full_name}', test)


for load in itertools.product(LOADS, ('dirty', 'remap'), ('msi', 'intx')):
    # The guest finds nothing behind nec-usb-xhci by INTx, before any save.
    if load[0] != 'q35_disks' or load[2] != 'intx':
        add_load(*load)


if __name__ == '__main__':
    QemuSystemTest.main()

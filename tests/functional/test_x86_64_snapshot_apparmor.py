#!/usr/bin/env python3
#
# Functional test of the snapshot device where AppArmor confines QEMU
#
# SPDX-License-Identifier: GPL-2.0-or-later

import io
from pathlib import Path
import re
import tarfile

from qemu_test import skipSlowTest
from snapshot.shell import ShellTest
from snapshot_libvirt import NEWER

ROOT = Path(__file__).resolve().parents[2]
MANUAL = ROOT / 'docs' / 'system' / 'devices' / 'snapshot.rst'
EMULATOR = '/opt/qemu/bin/qemu-system-x86_64'

# As in MANUAL
DOMAIN = '''
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/><apic/></features>
  <devices><emulator>{emulator}</emulator>{devices}</devices>
  <qemu:commandline>
    <qemu:arg value='-device'/>
    <qemu:arg value='snapshot,id=snap0,bus=pcie.0,addr=0x1e{options}'/>
  </qemu:commandline>
</domain>
'''
DISK = '''
<disk type='file'>
  <driver name='qemu' type='raw'/>
  <source file='/var/lib/libvirt/images/disk'/>
  <target dev='vda' bus='virtio'/>
</disk>
'''
DOMAINS = {
    'snap': ('', ''),
    'load': ('', ',load=/srv/snapshots/slot,touched=/srv/snapshots/touched'),
    'disk': (DISK, ',overlay-dir=/srv/snapshots'),
    'nodir': (DISK, ''),
}

# QEMU's firmware is where it is not allowed by Debian's own rules.
INSTALL = r'''
tar -xf /dev/vdb -C /
mkdir -p /opt/qemu/share/qemu /etc/apparmor.d/local/abstractions
cp -rL /usr/share/qemu/. /usr/share/seabios/. /opt/qemu/share/qemu
rm -r /usr/share/qemu /usr/share/seabios
mkdir /srv/snapshots
chown libvirt-qemu /srv/snapshots
truncate -s 16M /var/lib/libvirt/images/disk
'''

# What MANUAL's reader does; it ends where a command fails, or soon after
# something is denied.
WORK = r'''
set -e
hmp() {
    said=$(virsh -q qemu-monitor-command --hmp "$@")
    [ -z "$said" ] || { echo "$*: $said"; exit 1; }
    ! dmesg | grep -q DENIED || exit 1
}
begin() {
    virsh -q define "/root/$1.xml"
    virsh -q start "$1"
}
for name in snap load disk; do
    virsh -q destroy $name || :
    virsh -q undefine --managed-save $name || :
done >/dev/null 2>&1
rm -f /srv/snapshots/*

begin snap
aa-status | sed -n '/processes/,$p'
hmp snap x_snapshot_device_save
hmp snap 'x_snapshot_device_export /srv/snapshots/slot'
begin load
hmp load x_snapshot_device_restore
virsh -q destroy load
ls -s /srv/snapshots/touched
virsh -q save snap /srv/snapshots/saved
virsh -q restore /srv/snapshots/saved
hmp snap 'x_snapshot_device_import /srv/snapshots/slot 1'
virsh -q suspend snap
hmp snap 'x_snapshot_device_restore 1'
virsh -q qemu-monitor-command snap \
    '{"execute":"x-snapshot-device-verify","arguments":{"slot":1}}' |
    grep -o '"fields":0,\|"pages":0,'
virsh -q resume snap
virsh -q managedsave snap
virsh -q start snap
virsh -q save snap /srv/snapshots/sparse --image-format sparse
virsh -q restore /srv/snapshots/sparse
chown libvirt-qemu /srv/snapshots/sparse
hmp snap 'x_snapshot_device_import /srv/snapshots/sparse 2'
hmp snap 'x_snapshot_device_restore 2'
virsh -q destroy snap

begin disk
hmp disk x_snapshot_device_save
drive=/machine/peripheral/virtio-disk0/virtio-backend
hmp disk "qemu-io -d $drive \"write 0 1M\""
hmp disk 'x_snapshot_device_save 1'
hmp disk 'x_snapshot_device_export /srv/snapshots/disk 1'
hmp disk 'x_snapshot_device_restore 0'
virsh -q destroy disk
echo all works
'''

# What is denied first without the first rule of MANUAL, with that and without
# the second, and so on: the operation, whose profile, and the file
DENIED = (
    ('exec', 'libvirtd', EMULATOR),
    ('exec', 'libvirt-UUID', EMULATOR),
    ('open', 'libvirt-UUID', '/opt/qemu/share/qemu/bios-256k.bin'),
    ('mknod', 'libvirt-UUID', '/srv/snapshots/slot.XXXXXX'),
    ('open', 'libvirt-UUID', '/srv/snapshots/'),
    ('open', 'libvirt-UUID', '/proc/PID/pagemap'),
)
UUID = '-'.join(rf'[0-9a-f]{{{n}}}' for n in (8, 4, 4, 4, 12))
NAMES = (('libvirt-' + UUID, 'libvirt-UUID'), (r'/proc/\d+/', '/proc/PID/'),
         (r'\.[0-9A-Z]{6}$', '.XXXXXX'))


def rules():
    """The rules that MANUAL gives, each with its file, in MANUAL's order"""
    found = re.findall(r'``(/etc/apparmor\.d/\S+)``::\n\n((?:  \S.*\n)+)',
                       MANUAL.read_text(encoding='utf-8'))
    return [(file, rule.strip()) for file, block in found
            for rule in block.splitlines()]


def name(text):
    for pattern, to in NAMES:
        text = re.sub(pattern, to, text)
    return text


class SnapshotAppArmor(ShellTest):
    """
    Debian 13, its libvirt and AppArmor as they are installed, in a guest, as
    most hosts of tests have no AppArmor. scripts/fetch-libvirt makes the disk.
    """

    def payload(self):
        """A tar of QEMU and the files of this test"""
        path = self.scratch_file('payload.tar')
        files = {f'root/{name}.xml': DOMAIN.format(
            name=name, emulator=EMULATOR, devices=devices, options=options)
            for name, (devices, options) in DOMAINS.items()}
        files['root/work'] = WORK
        with tarfile.open(path, 'w') as tar:
            tar.add(self.qemu_bin, EMULATOR)
            for file, text in files.items():
                member = tarfile.TarInfo(file)
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        return path

    def boot(self):
        disk = NEWER.with_name('disk')
        if not disk.exists():
            self.skipTest(f'no {disk}: as root, run scripts/fetch-libvirt')
        self.require_device('name "snapshot"')
        self.set_machine('q35')
        kernel, = NEWER.glob('boot/vmlinuz-*')
        initrd, = NEWER.glob('boot/initrd.img-*')
        self.vm.add_args('-accel', 'tcg,thread=multi', '-smp', '2', '-m', '1G',
                         '-kernel', str(kernel), '-initrd', str(initrd),
                         '-append', 'root=/dev/vda rw console=ttyS0 quiet')
        for image in disk, self.payload():
            self.vm.add_args('-drive', 'if=virtio,format=raw,snapshot=on,'
                                       f'file={image}')
        self.launch()
        self.wait_for('login: ', 1200)
        self.log_in()

    def denied_by(self, commands):
        """What they print, and what AppArmor has denied meanwhile"""
        output = self.shell(f'dmesg -C\n{commands} 2>&1\n'
                            'dmesg | grep DENIED', 1200)
        self.log.info('%s', output)
        return output, [tuple(map(name, denial)) for denial in re.findall(
            r'="DENIED" operation="(.*?)" .*profile="(.*?)" name="(.*?)"',
            output)]

    def check_confined(self):
        """The rules allow no more than they say."""
        _, denied = self.denied_by(
            'virsh define /root/nodir.xml\nvirsh start nodir\n'
            'virsh qemu-monitor-command --hmp nodir x_snapshot_device_save')
        self.assertEqual(denied[:1], [('mknod', 'libvirt-UUID',
                                       '/var/tmp/vl.XXXXXX')])

    @skipSlowTest()
    def test_rules(self):
        """
        Catches rules in the manual that are not enough, or more than enough,
        and a file that QEMU opens and no rule tells of.
        """
        found = rules()
        self.assertEqual(len(found), len(DENIED), found)
        self.boot()
        self.assertNotIn('cannot', self.shell(INSTALL, 600))
        said = self.shell(f'{EMULATOR} --version 2>&1')
        if not said.startswith('QEMU emulator'):
            self.skipTest(f'a Debian 13 cannot run {self.qemu_bin}: {said}')
        for (file, rule), denial in zip(found, DENIED):
            output, denied = self.denied_by('sh /root/work')
            self.assertEqual(denied[:1], [denial], f'without {rule}: {output}')
            self.shell(f"echo '{rule}' >>{file}\n"
                       'apparmor_parser -r /etc/apparmor.d/usr.sbin.libvirtd')

        output, denied = self.denied_by('sh /root/work')
        self.assertEqual(denied, [], output)
        self.assertIn('\n"fields":0,\n"pages":0,\n', output)
        self.assertIn('\nall works', output)
        self.assertRegex(output, r' enforce mode\.\n( .*\n)* +' +
                         rf'{EMULATOR} \(\d+\) libvirt-{UUID} *\n')
        self.check_confined()


if __name__ == '__main__':
    ShellTest.main()

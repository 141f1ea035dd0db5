#!/usr/bin/env python3
#
# Functional test of the snapshot device in a domain of libvirt's
#
# SPDX-License-Identifier: GPL-2.0-or-later

import contextlib
import json
import os
from pathlib import Path
import tempfile
import time

from qemu_test import QemuSystemTest, skipSlowTest
from snapshot_libvirt import NEWER, Libvirt, LibvirtError, missing

ROOT = Path(__file__).resolve().parents[2]

# As in docs/system/devices/snapshot.rst, with a kernel
DOMAIN = '''
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>snap</name>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{linux}/vmlinuz</kernel>
    <initrd>{linux}/initramfs</initrd>
    <cmdline>console=ttyS0 quiet panic=-1</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <devices>
    <emulator>{qemu}</emulator>
    <serial type='file'><source path='{directory}/console'/></serial>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-device'/>
    <qemu:arg value='snapshot,id=snap0,bus=pcie.0,addr=0x1e'/>
  </qemu:commandline>
</domain>
'''


class SnapshotLibvirt(QemuSystemTest):

    def setUp(self):
        super().setUp()
        self.require_device('name "snapshot"')
        self.linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX',
                                    ROOT / 'build/linux'))
        if not (self.linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {self.linux}: run '
                          'scripts/linux-guest')

    def start(self, root=None):
        """The system's libvirt, or that of @root"""
        reason = missing(root)
        if reason:
            self.skipTest(reason)
        temporary = tempfile.TemporaryDirectory(prefix='virt')
        self.addCleanup(temporary.cleanup)
        self.directory = temporary.name
        libvirt = Libvirt(self.directory, self.log_file('libvirtd.log'), root)
        reason = libvirt.refusal(self.qemu_bin, self.linux / 'vmlinuz',
                                 self.linux / 'initramfs')
        if reason:
            self.skipTest(f'nobody cannot run {self.qemu_bin}: {reason}')
        self.virsh = libvirt.virsh
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(libvirt)
        self.log.info('libvirt %s', self.virsh('--version'))
        return libvirt

    def qmp(self, execute, **arguments):
        said = self.virsh('qemu-monitor-command', 'snap', json.dumps(
            {'execute': execute, 'arguments': arguments}))
        return json.loads(said)['return']

    def hmp(self, command):
        said = self.virsh('qemu-monitor-command', '--hmp', 'snap', command)
        self.assertEqual(said, '')

    def destroy(self):
        with contextlib.suppress(LibvirtError):
            self.virsh('destroy', 'snap')

    def wait_for(self, what, condition):
        end = time.monotonic() + 120
        while not condition():
            self.assertLess(time.monotonic(), end, what)
            time.sleep(0.1)

    def verify(self, slot):
        found = self.qmp('x-snapshot-device-verify', slot=slot)
        self.assertEqual((found['pages'], found['fields']), (0, 0), found)

    def check_domain(self):
        domain = Path(self.directory, 'domain.xml')
        domain.write_text(DOMAIN.format(linux=self.linux, qemu=self.qemu_bin,
                                        directory=self.directory))
        self.virsh('define', str(domain))
        self.addCleanup(self.destroy)
        self.virsh('start', 'snap')
        console = Path(self.directory, 'console')
        self.wait_for('the guest does not boot',
                      lambda: '#' in console.read_text(errors='replace'))
        self.virsh('suspend', 'snap')
        self.qmp('x-snapshot-device-save', slot=0)
        self.hmp(f'x_snapshot_device_export {self.directory}/slot')
        self.virsh('resume', 'snap')

        # The machine goes along, slots do not.
        self.virsh('save', 'snap', f'{self.directory}/saved')
        self.virsh('restore', f'{self.directory}/saved')
        self.assertEqual(self.qmp('x-query-snapshot-device')['saved'], [])
        self.hmp(f'x_snapshot_device_import {self.directory}/slot 1')
        self.virsh('suspend', 'snap')
        self.qmp('x-snapshot-device-restore', slot=1)
        self.verify(1)
        self.virsh('resume', 'snap')

        self.virsh('managedsave', 'snap')
        self.virsh('start', 'snap')
        self.qmp('x-snapshot-device-save', slot=2)
        self.qmp('x-snapshot-device-restore', slot=2)

    def check_sparse(self):
        """A file of libvirt's that can be a slot"""
        path = f'{self.directory}/sparse'
        self.virsh('save', 'snap', path, '--image-format', 'sparse')
        self.virsh('restore', path)
        self.virsh('suspend', 'snap')
        self.hmp(f'x_snapshot_device_import {path} 3')
        self.qmp('x-snapshot-device-restore', slot=3)
        self.verify(3)

    def test_domain(self):
        """
        Catches: a device that libvirt's PCI addresses, or its save and restore,
        do not go along with; a file of another process that is refused there.
        """
        libvirt = self.start()
        self.check_domain()
        if libvirt.sparse():
            self.check_sparse()

    @skipSlowTest()
    def test_newer(self):
        """The same with Debian 13's; and a file of its own that is refused"""
        self.assertTrue(self.start(NEWER).sparse())
        self.check_domain()
        self.check_sparse()


if __name__ == '__main__':
    QemuSystemTest.main()

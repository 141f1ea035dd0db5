#!/usr/bin/env python3
#
# Functional test of the snapshot device in a domain of libvirt's
#
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import os
from pathlib import Path
import shutil
import subprocess
import tempfile
import time

from qemu_test import QemuSystemTest

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
    """
    A daemon of a user's own, with all that it writes in one directory; as root
    has none, nobody's.
    """

    def setUp(self):
        super().setUp()
        self.require_device('name "snapshot"')
        self.linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX',
                                    ROOT / 'build/linux'))
        if not (self.linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {self.linux}: run '
                          'scripts/linux-guest')
        for program in 'libvirtd', 'virsh', 'setpriv':
            path = f'{os.environ["PATH"]}:/usr/sbin'
            if not shutil.which(program, path=path):
                self.skipTest(f'there is no {program}: apt-get install '
                              'libvirt-daemon libvirt-daemon-driver-qemu '
                              'libvirt-clients')
        temporary = tempfile.TemporaryDirectory(prefix='virt')
        self.addCleanup(temporary.cleanup)
        self.directory = temporary.name
        self.env = {**os.environ, 'HOME': self.directory,
                    'PATH': f'{os.environ["PATH"]}:/usr/sbin'}
        for name in 'RUNTIME', 'CONFIG', 'CACHE':
            path = Path(self.directory, name.lower())
            path.mkdir()
            self.env[f'XDG_{name}_{"DIR" if name == "RUNTIME" else "HOME"}'] \
                = str(path)
        self.user = []
        if os.getuid() == 0:
            self.user = ['setpriv', '--reuid', 'nobody', '--regid', 'nogroup',
                         '--clear-groups']
            subprocess.run(['chown', '-R', 'nobody', self.directory],
                           check=True)
        if subprocess.run([*self.user, 'test', '-x', self.qemu_bin, '-a', '-r',
                           self.linux / 'initramfs']).returncode:
            self.skipTest(f'nobody cannot run {self.qemu_bin}')
        self.log_file = open(self.scratch_file('libvirtd.log'), 'wb')
        self.addCleanup(self.log_file.close)
        daemon = subprocess.Popen([*self.user, 'libvirtd'], env=self.env,
                                  cwd=self.directory, stdout=self.log_file,
                                  stderr=subprocess.STDOUT)
        self.addCleanup(daemon.wait)
        self.addCleanup(daemon.terminate)

    def virsh(self, *args, check=True):
        done = subprocess.run(
            [*self.user, 'virsh', '-q', '-c', 'qemu:///session', *args],
            env=self.env, cwd=self.directory, text=True, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if check:
            self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout.strip()

    def qmp(self, execute, **arguments):
        said = self.virsh('qemu-monitor-command', 'snap', json.dumps(
            {'execute': execute, 'arguments': arguments}))
        return json.loads(said)['return']

    def hmp(self, command):
        said = self.virsh('qemu-monitor-command', '--hmp', 'snap', command)
        self.assertEqual(said, '')

    def wait_for(self, what, condition):
        end = time.monotonic() + 120
        while not condition():
            self.assertLess(time.monotonic(), end, what)
            time.sleep(0.1)

    def verify(self, slot):
        found = self.qmp('x-snapshot-device-verify', slot=slot)
        self.assertEqual((found['pages'], found['fields']), (0, 0), found)

    def test_domain(self):
        """
        Catches: a device that libvirt's PCI addresses, or its save and restore,
        do not go along with; a file of another process that is refused there.
        """
        domain = Path(self.directory, 'domain.xml')
        domain.write_text(DOMAIN.format(linux=self.linux, qemu=self.qemu_bin,
                                        directory=self.directory))
        self.wait_for('libvirtd does not answer',
                      lambda: 'error' not in self.virsh('list', check=False))
        self.virsh('define', str(domain))
        self.addCleanup(self.virsh, 'destroy', 'snap', check=False)
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


if __name__ == '__main__':
    QemuSystemTest.main()

#!/usr/bin/env python3
#
# Functional test of the snapshot device: a whole Debian
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
import shutil
import subprocess
import time

from qemu_test import QemuSystemTest, skipSlowTest
from snapshot.shell import ShellTest
from test_x86_64_snapshot_disks import digest

ROUNDS = int(os.getenv('QEMU_TEST_SNAPSHOT_MOST', '100'))
CODE = Path('/usr/share/OVMF/OVMF_CODE_4M.fd')
VARS = CODE.with_name('OVMF_VARS_4M.fd')

ABSENT = r'''
command -v hello || echo no program
dpkg -s hello 2>&1 | head -n 1
ls -d $variable /run/round 2>&1
'''
INSTALL = r'''
dpkg -i /root/hello_*.deb 2>&1 | cat
hello
sha256sum /var/lib/dpkg/status /usr/bin/hello
printf '\7\0\0\0value' >$variable; cat $variable | tail -c 5; echo
touch /run/round
sync
'''
SETUP = ('variable=/sys/firmware/efi/efivars/'
         'Round-12345678-1234-1234-1234-123456789abc')


class SnapshotDebian(ShellTest):
    """
    The machine that people have: systemd, ext4 on qcow2, UEFI with variables,
    and the devices that QEMU has by default. scripts/linux-guest --debian makes
    the disk.
    """

    def boot(self):
        source = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX',
                                Path(__file__).resolve().parents[2] /
                                'build/linux')) / 'debian/disk'
        for path in source, CODE, VARS:
            if not path.exists():
                self.skipTest(f'no {path}: run scripts/linux-guest --debian')
        self.require_device('name "snapshot"')
        self.set_machine('q35')
        self.disk = Path(self.scratch_file('disk.qcow2'))
        self.vars = Path(self.scratch_file('vars.fd'))
        subprocess.run([os.environ['QEMU_TEST_QEMU_IMG'], 'convert', '-O',
                        'qcow2', source, self.disk], check=True)
        shutil.copyfile(VARS, self.vars)
        # QEMUMachine leaves the VGA card out.
        self.vm.add_args('-vga', 'std', '-accel', 'tcg', '-m', '1G',
                         '-drive', 'if=pflash,format=raw,unit=0,readonly=on,'
                                   f'file={CODE}',
                         '-drive', 'if=pflash,format=raw,unit=1,'
                                   f'file={self.vars}',
                         '-drive', f'format=qcow2,file={self.disk}',
                         '-device', 'snapshot,verify=on')
        self.launch()

    def check_absent(self):
        output = self.shell(ABSENT)
        self.assertIn('no program\n', output)
        self.assertIn("package 'hello' is not installed", output)
        self.assertEqual(output.count('No such file or directory'), 2, output)

    @skipSlowTest()
    def test_install(self):
        """
        Catches a disk, variables of UEFI or memory that do not go back, or not
        to one instant: the package, which the disk holds, and what dpkg and
        the kernel know of it are then not those of the first time. And
        anything that is written to the images after the save.
        """
        self.boot()
        self.wait_for('debian login: ', 1200)
        self.vm.cmd('x-snapshot-device-save', slot=0)
        images = digest(self.disk), digest(self.vars)
        first = None
        for i in range(ROUNDS):
            start = time.monotonic()
            self.log_in(SETUP)
            self.check_absent()
            output = self.shell(INSTALL)
            self.assertIn('\nHello, world!\n', output)
            self.assertTrue(output.endswith('\nvalue'), output)
            first = first or output
            self.assertEqual(output, first, f'round {i}')
            for disk in self.vm.cmd('x-query-snapshot-device')['disks']:
                self.assertGreater(disk['clusters'], 0, disk)
            self.vm.cmd('x-snapshot-device-restore', slot=0)
            self.log.info('round %d: %.1f s', i, time.monotonic() - start)
        self.log_in(SETUP)
        self.check_absent()

        info = self.vm.cmd('x-query-snapshot-device')
        self.assertEqual(info['verified'], ROUNDS)
        self.assertEqual(info['mismatched'], 0, info['mismatches'])
        self.vm.shutdown()
        self.assertEqual((digest(self.disk), digest(self.vars)), images,
                         'written to the image')
        subprocess.run([os.environ['QEMU_TEST_QEMU_IMG'], 'check', '-q',
                        self.disk], check=True)


if __name__ == '__main__':
    QemuSystemTest.main()

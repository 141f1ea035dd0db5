#!/usr/bin/env python3
#
# Functional test that the snapshot device loses no memory
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
import re
import time

from qemu_test import QemuSystemTest, skipSlowTest
from snapshot import build_guest, kvm_copies_page_tables


class SnapshotSoak(QemuSystemTest):
    """
    As much memory at the end of many restores as after a fifth of them, when
    heaps and caches have come to their size. QEMU_TEST_SNAPSHOT_RESTORES says
    how many restores they are.
    """

    RESTORES = int(os.getenv('QEMU_TEST_SNAPSHOT_RESTORES', '100000'))

    # Bytes a restore; the smallest block of malloc() has 32
    LIMIT = 16

    def memory(self):
        """
        QEMU's heap and stacks, and its private copies of pages, in KiB

        What a restore replaces is freed later, by the RCU thread, which a
        busy guest can outrun; and QEMU gives memory back to the host when
        that thread has nothing left to do (--enable-malloc-trim).
        """
        self.vm.cmd('stop')
        time.sleep(1)
        text = Path(f'/proc/{self.vm.get_pid()}/smaps_rollup').read_text()
        self.vm.cmd('cont')
        return int(re.search(r'^Anonymous: +(\d+)', text, re.M).group(1))

    def restore_until(self, count):
        last, alive = -1, 0
        while True:
            done = self.vm.cmd('x-query-snapshot-device')['restores']
            if done >= count:
                return
            if time.monotonic() > alive:
                self.assertGreater(done, last, 'it restores no more')
                last, alive = done, time.monotonic() + 30
            time.sleep(0.02)

    def soak(self, machine, *args, restores=RESTORES, accel='tcg'):
        # AddressSanitizer keeps back what is freed; here it shall not.
        if 'ASAN_OPTIONS' in os.environ:
            os.environ['ASAN_OPTIONS'] += \
                ':quarantine_size_mb=0:thread_local_quarantine_size_kb=0'
        self.require_accelerator(accel.split(',')[0])
        self.require_device('name "snapshot"')
        if accel != 'tcg' and kvm_copies_page_tables():
            self.skipTest('ram=auto is not dirty: this KVM has no '
                          'two-dimensional paging')
        guest = self.scratch_file('guest.elf')
        build_guest(guest)
        self.set_machine(machine)
        self.vm.add_args('-nodefaults', '-accel', accel, '-m', '32',
                         '-rtc', 'clock=vm', '-kernel', guest,
                         '-append', 'case=bench pages=10',
                         '-device', 'snapshot,verify=1000', *args)
        self.vm.launch()
        self.restore_until(restores / 5)
        early = self.memory()
        self.restore_until(restores)
        late = self.memory()
        self.log.info('%d restores: %d KiB, later %d KiB', restores, early,
                      late)
        self.assertLess((late - early) * 1024 / (0.8 * restores), self.LIMIT)
        info = self.vm.cmd('x-query-snapshot-device')
        self.assertGreaterEqual(info['verified'], restores // 1000)
        self.assertEqual(info['mismatched'], 0, info['mismatches'])

    def test_pc(self):
        self.soak('pc')

    def test_kvm(self):
        self.soak('pc', accel='kvm')

    def test_kvm_ring(self):
        """Each entry of a ring is used many times."""
        self.soak('q35', accel='kvm,dirty-ring-size=1024')

    @skipSlowTest()
    def test_q35_devices(self):
        """State of which a load allocates parts: queues, requests, lists"""
        self.soak('q35', '-device', 'virtio-net-pci',
                  '-device', 'virtio-scsi-pci', '-device', 'virtio-serial',
                  '-device', 'qemu-xhci', '-device', 'usb-tablet',
                  '-device', 'e1000e', '-device', 'VGA',
                  restores=self.RESTORES // 10)


if __name__ == '__main__':
    QemuSystemTest.main()

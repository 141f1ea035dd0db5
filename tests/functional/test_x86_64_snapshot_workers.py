#!/usr/bin/env python3
#
# Functional test of the snapshot device: many machines that share one file
#
# SPDX-License-Identifier: GPL-2.0-or-later

import hashlib
import os
from pathlib import Path
import random
import time

from qemu_test import QemuSystemTest
from snapshot import build_guest

MIB = 1 << 20


class SnapshotWorkers(QemuSystemTest):
    """
    Bare-metal guests that restore themselves all the time, from one file, with
    one image of a disk.
    """

    PATIENCE = int(os.getenv('QEMU_TEST_SNAPSHOT_PATIENCE', '1'))
    FULL = bool(os.getenv('FULL'))
    WORKERS = 100 if FULL else 12
    KILLED = WORKERS // 4
    RESTORES = 1000
    VERIFY = 100            # every so manyth restore
    SLOT = 0

    def setUp(self):
        super().setUp()
        self.require_device('name "snapshot"')
        self.rng = random.Random(1)
        self.guest = self.scratch_file('guest.elf')
        build_guest(self.guest)
        self.file = Path(self.scratch_file('slot.snap'))
        self.disk = Path(self.scratch_file('disk'))
        self.disk.write_bytes(self.rng.randbytes(MIB))
        self.started = 0

    def start(self, device):
        self.started += 1
        vm = self.get_vm('-M', 'q35', '-nodefaults', '-accel', 'tcg', '-m',
                         '32', '-rtc', 'clock=vm', '-kernel', self.guest,
                         '-append', 'case=bench pages=100', '-blockdev',
                         'driver=snapshot-overlay,node-name=disk,'
                         'file.driver=raw,file.file.driver=file,'
                         f'file.file.filename={self.disk}',
                         '-device', 'ide-hd,drive=disk,id=disk', '-device',
                         device, '-S', name=f'vm{self.started}')
        vm.launch()
        return vm

    def worker(self):
        # Each restore takes that 50 times as long.
        ram = 'remap' if self.FULL and not self.started % 10 else 'dirty'
        return self.start(f'snapshot,ram={ram},verify={self.VERIFY},'
                          f'load={self.file}')

    @staticmethod
    def info(vm):
        return vm.cmd('x-query-snapshot-device')

    def wait_restores(self, machines, count):
        """Stop each that has so many"""
        end = time.monotonic() + 300 * self.PATIENCE
        running = list(machines)
        while running:
            self.assertLess(time.monotonic(), end, 'it restores no more')
            time.sleep(0.05)
            for vm in list(running):
                if self.info(vm)['restores'] >= count:
                    vm.cmd('stop')
                    running.remove(vm)

    def write(self, vm):
        """To its disk, between two of the guest's restores"""
        vm.cmd('stop')
        said = vm.cmd('human-monitor-command', command_line='qemu-io -d disk '
                      f'"write -q -P {self.rng.randrange(1, 256)} 0 64k"')
        self.assertNotIn('rror', said)
        written, = self.info(vm)['disks']
        self.assertEqual(written['clusters'], 16)
        vm.cmd('cont')

    @staticmethod
    def digests(*paths):
        return [hashlib.sha256(path.read_bytes()).digest() for path in paths]

    def test_many(self):
        """
        Catches: a worker that is not exact, or sees what another has written to
        RAM or to the disk; one that changes the file or the image; one that is
        harmed by another that was killed at any time, or cannot start then.
        """
        first = self.start('snapshot')
        first.cmd('cont')
        self.wait_restores([first], 1)
        first.cmd('x-snapshot-device-export', job_id='job', slot=self.SLOT,
                  file=str(self.file))
        while first.cmd('query-jobs')[0]['status'] != 'concluded':
            time.sleep(0.02)
        self.assertNotIn('error', first.cmd('query-jobs')[0])
        first.shutdown()
        before = self.digests(self.file, self.disk)

        workers = [self.worker() for i in range(self.WORKERS + self.KILLED)]
        for vm in workers:
            vm.cmd('cont')
        for _ in range(self.KILLED):
            victim = workers.pop(self.rng.randrange(len(workers)))
            self.write(victim)
            victim.kill()
            self.write(self.rng.choice(workers))
        workers.append(self.worker())
        workers[-1].cmd('cont')
        self.wait_restores(workers, self.RESTORES)
        for vm in workers:
            vm.cmd('x-snapshot-device-restore', slot=self.SLOT)
            found = vm.cmd('x-snapshot-device-verify', slot=self.SLOT)
            self.assertEqual((found['pages'], found['fields'],
                              found['disks']), (0, 0, []), found)
            info = self.info(vm)
            self.assertEqual(info['mismatched'], 0, info)
            self.assertGreaterEqual(info['verified'],
                                    self.RESTORES // self.VERIFY)
            self.assertEqual(info['disks'][0]['clusters'], 0)
        self.assertEqual(self.digests(self.file, self.disk), before)


if __name__ == '__main__':
    QemuSystemTest.main()

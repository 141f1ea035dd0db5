#!/usr/bin/env python3
#
# Functional test of the snapshot device on machines of many shapes
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
import time
from unittest import skipUnless

from qemu_test import QemuSystemTest
from snapshot import build_guest


class Shapes(QemuSystemTest):
    """
    The bare-metal guest, each of whose restores is verified, with numbers of
    CPUs, threads to run them, sizes and kinds of memory that the other tests
    do not have.
    """

    def run_case(self, case, *args, machine='pc', accel='tcg', cpus=1,
                 memory='32M', device='snapshot,verify=on', restores=20):
        self.log.info('%s: %s -smp %d -m %s %s %s', case, machine, cpus,
                      memory, device, args)
        self.require_device('name "snapshot"')
        guest = Path(self.scratch_file('guest.elf'))
        if not guest.exists():
            build_guest(guest)
        console = Path(self.scratch_file('console'))
        console.unlink(missing_ok=True)
        vm = self.get_vm(name=f'{time.monotonic_ns()}')
        vm.set_machine(machine)
        vm.add_args('-nodefaults', '-accel', accel, '-m', memory,
                    '-smp', str(cpus), '-rtc', 'clock=vm', '-serial', 'null',
                    '-kernel', str(guest), '-device', device,
                    '-append', f'case={case} cpus={cpus} n={restores}',
                    '-chardev', f'file,id=debug,path={console}',
                    '-device', 'isa-debugcon,iobase=0xe9,chardev=debug',
                    '-device', 'isa-debug-exit,iobase=0xf4,iosize=4',
                    '-action', 'shutdown=pause', *args)
        vm.launch()
        event = vm.event_wait('SHUTDOWN', timeout=240)
        output = console.read_text(errors='replace')
        self.assertIsNotNone(event, output[-500:])
        self.assertIn(f'PASS {case}', output)
        info = vm.cmd('x-query-snapshot-device')
        self.assertGreaterEqual(info['verified'], 1)
        self.assertEqual(info['mismatched'], 0, info['mismatches'])
        vm.shutdown()

    def do_cpus(self, machine, thread):
        for cpus in 1, 2, 4, 8:
            for ram in 'dirty', 'remap':
                self.run_case('smp' if cpus > 1 else 'ram', machine=machine,
                              accel=f'tcg,thread={thread}', cpus=cpus,
                              device=f'snapshot,ram={ram},verify=on',
                              restores=10)

    def test_cpus_multi(self):
        self.do_cpus('q35', 'multi')

    def test_cpus_single(self):
        self.do_cpus('pc', 'single')

    def test_memory_size(self):
        """The larger one without writing to all of it, which takes long"""
        for case, memory in ('ram', '8M'), ('ram', '64M'), ('registers', '8G'):
            self.run_case(case, memory=memory, restores=4,
                          device='snapshot,verify=2')

    def test_memory_kind(self):
        """Two NUMA nodes, the guest in the first of them"""
        path = self.scratch_file('memory')
        self.do_memory_kinds('ram', 'ram,share=on', 'ram,prealloc=on',
                             'ram,merge=off,dump=off', 'memfd',
                             'memfd,share=off', f'file,mem-path={path}',
                             f'file,mem-path={path},share=on')

    @skipUnless(os.access('/dev/shm', os.W_OK), 'needs a writable /dev/shm')
    def test_memory_shm(self):
        self.do_memory_kinds('shm')

    def do_memory_kinds(self, *kinds):
        for kind in kinds:
            for ram in 'dirty', 'remap':
                self.run_case(
                    'ram', '-object', f'memory-backend-{kind},id=m,size=32M',
                    '-object', 'memory-backend-ram,id=n,size=32M',
                    '-numa', 'node,memdev=m', '-numa', 'node,memdev=n',
                    device=f'snapshot,ram={ram},verify=on', machine='q35',
                    memory='64M', restores=5)

    def test_microvm(self):
        """
        It has PCIe only if that is asked for. Saved in the firmware, it boots
        a kernel after each restore; not to its end, as Linux finds no clock
        source in this machine without KVM.
        """
        linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX',
                               Path(__file__).resolve().parents[2] /
                               'build/linux'))
        if not (linux / 'vmlinuz').exists():
            self.skipTest(f'no vmlinuz in {linux}: run scripts/linux-guest')
        serial = Path(self.scratch_file('serial'))
        self.set_machine('microvm')
        self.vm.add_args('-machine', 'pcie=on,rtc=on', '-nodefaults',
                         '-accel', 'tcg', '-m', '256', '-smp', '2',
                         '-serial', f'file:{serial}',
                         '-kernel', str(linux / 'vmlinuz'),
                         '-append', 'console=ttyS0',
                         '-device', 'snapshot,verify=on', '-S')
        self.vm.launch()
        self.vm.cmd('x-snapshot-device-save', slot=0)
        self.vm.cmd('cont')
        for restore in range(3):
            end = time.monotonic() + 120
            while serial.read_text().count('Linux version') <= restore:
                self.assertLess(time.monotonic(), end, 'no kernel')
                time.sleep(0.05)
            self.vm.cmd('x-snapshot-device-restore', slot=0)
        info = self.vm.cmd('x-query-snapshot-device')
        self.assertEqual((info['verified'], info['mismatched']), (3, 0),
                         info['mismatches'])

    def start_with_tables(self, size, ram):
        """Stopped before the firmware, and so many bytes of ACPI tables more"""
        table = Path(self.scratch_file('table'))
        table.write_bytes(b'x' * 1024)
        args = ['-acpitable', f'sig=OEM1,data={table}'] * (size // 1024)
        rest = Path(self.scratch_file('rest'))
        rest.write_bytes(b'x' * (size % 1024))
        vm = self.get_vm(name=f'{time.monotonic_ns()}')
        vm.set_machine('q35')
        vm.add_args('-nodefaults', '-accel', 'tcg', '-m', '32M', '-S',
                    '-device', f'snapshot,ram={ram},verify=on', *args,
                    '-acpitable', f'sig=OEM2,data={rest}')
        vm.launch()
        return vm

    def tables_block(self, vm):
        """Bytes used of the RAM block that has ACPI's tables"""
        blocks = vm.cmd('human-monitor-command', command_line='info ramblock')
        line = next(l for l in blocks.splitlines() if 'etc/acpi/tables' in l)
        return int(line.split()[-4], 16)

    def test_resized(self):
        """
        ACPI's tables leave no room in their block. When firmware has placed
        the PCI configuration space, a table tells where, and the block grows.
        """
        self.set_machine('q35')
        fits, fits_not = 0, 128 * 1024
        while fits_not - fits > 1:
            size = (fits + fits_not) // 2
            vm = self.start_with_tables(size, 'dirty')
            if self.tables_block(vm) == 128 * 1024:
                fits = size
            else:
                fits_not = size
            vm.shutdown()
        for ram in 'dirty', 'remap':
            vm = self.start_with_tables(fits, ram)
            vm.cmd('x-snapshot-device-save', slot=0)
            vm.cmd('cont')
            end = time.monotonic() + 60
            while self.tables_block(vm) == 128 * 1024:
                self.assertLess(time.monotonic(), end, 'it did not grow')
                time.sleep(0.05)
            reply = vm.qmp('x-snapshot-device-restore', slot=0)
            self.assertIn("etc/acpi/tables' was resized after the save",
                          reply['error']['desc'])
            vm.cmd('x-snapshot-device-save', slot=1)
            for _ in range(5):
                # All tables are written again
                vm.cmd('system_reset')
                time.sleep(0.3)
                vm.cmd('x-snapshot-device-restore', slot=1)
            info = vm.cmd('x-query-snapshot-device')
            self.assertEqual((info['verified'], info['mismatched']), (5, 0),
                             info['mismatches'])
            vm.shutdown()


if __name__ == '__main__':
    QemuSystemTest.main()

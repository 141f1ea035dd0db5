#!/usr/bin/env python3
#
# Functional test that the snapshot device restores machines exactly
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
import socket

from qemu_test import QemuSystemTest
from snapshot import build_guest


class Gdb:
    """As much of GDB's protocol as it takes to change a machine"""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)

    def close(self):
        self.socket.close()

    def command(self, text):
        self.socket.sendall(f'${text}#{sum(text.encode()) % 256:02x}'.encode())
        reply = b''
        while reply.count(b'#') == 0 or len(reply.split(b'#')[1]) < 2:
            reply += self.socket.recv(4096)
        self.socket.sendall(b'+')
        return reply.decode().split('$')[1].split('#')[0]

    def write_register(self, number, value, size=8):
        value = value.to_bytes(size, 'little').hex()
        return self.command(f'P{number:x}={value}')

    def flip_byte(self, address):
        byte = int(self.command(f'm{address:x},1'), 16) ^ 0xff
        return self.command(f'M{address:x},1:{byte:02x}')


class Machine(QemuSystemTest):
    """What the classes below share: guests, and what differs after restores"""

    # How often a guest comes to the place at which it is compared
    ARRIVALS = int(os.getenv('QEMU_TEST_SNAPSHOT_ARRIVALS', '100'))

    EXACT = ('-rtc', 'clock=vm', '-icount', 'shift=3,sleep=off',
             '-device', 'pvpanic', '-action', 'panic=pause')

    def start(self, machine, device, *args):
        self.require_device('name "snapshot"')
        self.vm.set_machine(machine)
        self.vm.add_args('-accel', 'tcg', '-device', device, *args)
        self.vm.launch()

    def bare_metal(self, machine, case, *args, device='snapshot', cpus=1,
                   memory=16, **options):
        guest = self.scratch_file('guest.elf')
        if not Path(guest).exists():
            build_guest(guest)
        self.console = Path(self.scratch_file('console'))
        options = ' '.join(f'{k}={v}' for k, v in options.items())
        self.start(machine, device, '-nodefaults', '-m', str(memory),
                   '-smp', str(cpus), '-serial', 'null', '-kernel', guest,
                   '-append', f'case={case} cpus={cpus} {options}',
                   '-chardev', f'file,id=debug,path={self.console}',
                   '-device', 'isa-debugcon,iobase=0xe9,chardev=debug',
                   '-device', 'isa-debug-exit,iobase=0xf4,iosize=4', *args)

    def linux(self, machine, run, *args, device='snapshot', memory=128):
        linux = os.getenv('QEMU_TEST_SNAPSHOT_LINUX')
        if linux:
            linux = Path(linux)
        else:
            linux = Path(__file__).resolve().parents[2] / 'build' / 'linux'
        if not (linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {linux}: run scripts/linux-guest')
        self.console = Path(self.scratch_file('console'))
        self.start(machine, device, '-m', str(memory), '-serial',
                   f'file:{self.console}', '-kernel', str(linux / 'vmlinuz'),
                   '-initrd', str(linux / 'initramfs'),
                   '-append', 'console=ttyS0 panic=-1 quiet '
                              f'snapshot.run={run}', *args)

    def wait_for_event(self, name, timeout=120):
        event = self.vm.event_wait(name, timeout=timeout)
        self.assertIsNotNone(event, f'no {name}: '
                             + self.console.read_text(errors='replace')[-500:])

    def verify(self, slot):
        return self.vm.cmd('x-snapshot-device-verify', slot=slot)

    def assert_same(self, found, when):
        self.assertEqual((found['pages'], found['fields']), (0, 0),
                         f'{when}: {found}')


class Verified(Machine):
    """
    Each restore is verified. Catches a restore that leaves something, in any
    state that these guests bring a machine to.
    """

    def finish(self, passed, least):
        self.wait_for_event('SHUTDOWN')
        info = self.vm.cmd('x-query-snapshot-device')
        self.assertIn(passed, self.console.read_text(errors='replace'))
        self.log.info('%d of %d restores verified', info['verified'],
                      info['restores'])
        self.assertGreaterEqual(info['verified'], least)
        self.assertEqual(info['mismatched'], 0, info['mismatches'])
        self.assert_same(info['mismatches'], 'in sum')
        self.vm.shutdown()

    def cases(self, machine, ram):
        for case, options, args in (
                ('ram', {'n': 20}, ()),
                ('fpu', {'n': 50}, ()),
                ('system', {'n': 50}, ()),
                ('registers', {'n': 50}, ()),
                ('timer_armed', {'n': 20}, ('-rtc', 'clock=vm')),
                ('timer_pending', {'n': 20}, ('-rtc', 'clock=vm')),
                ('irqs', {'n': 50}, ('-rtc', 'clock=vm')),
                ('queues', {'n': 50}, ()),
                ('pam', {'n': 50}, ()),
                ('vram', {'n': 10}, ('-vga', 'std')),
                ('smp', {'n': 20, 'cpus': 2}, ())):
            with self.subTest(case=case):
                self._vms.clear()
                self.bare_metal(machine, case, '-action', 'shutdown=pause',
                                *args, memory=32, **options,
                                device=f'snapshot,ram={ram},verify=on')
                self.finish(f'PASS {case}', 1)

    def test_pc_dirty(self):
        self.cases('pc', 'dirty')

    def test_pc_remap(self):
        self.cases('pc', 'remap')

    def test_q35_dirty(self):
        self.cases('q35', 'dirty')

    def test_q35_remap(self):
        self.cases('q35', 'remap')

    def linux_work(self, machine, ram, verify, *args):
        self.linux(machine, 'work,guest,100,10', '-action', 'shutdown=pause',
                   *args, memory=256,
                   device=f'snapshot,ram={ram},verify={verify}')
        self.finish('work: same result', 100 // verify)

    def test_linux_pc_dirty(self):
        self.linux_work('pc', 'dirty', 1)

    def test_linux_pc_remap_smp(self):
        self.linux_work('pc', 'remap', 5, '-smp', '2')

    def test_linux_q35_dirty_smp(self):
        self.linux_work('q35', 'dirty', 1, '-smp', '2')

    def test_linux_q35_remap(self):
        self.linux_work('q35', 'remap', 5)


class Faults(Machine):
    """Catches a register or a byte of a running machine not compared."""

    # By gdb's number
    REGISTERS = {0: 'env.regs[0]', 1: 'env.regs[3]', 2: 'env.regs[1]',
                 3: 'env.regs[2]', 4: 'env.regs[6]', 5: 'env.regs[7]',
                 6: 'env.regs[5]', 16: 'env.eip', 17: 'env.eflags'}

    def faults(self, machine, ram):
        path = self.socket_dir().name + '/gdb'
        self.bare_metal(machine, 'endless', '-gdb',
                        f'unix:{path},server=on,wait=off',
                        device=f'snapshot,ram={ram}')
        self.vm.cmd('stop')
        self.vm.cmd('x-snapshot-device-save', slot=1)
        self.assert_same(self.verify(1), 'saved')
        gdb = Gdb(path)
        for number, field in self.REGISTERS.items():
            size = 4 if number == 17 else 8
            self.assertEqual(gdb.write_register(number, 0x8d5, size), 'OK')
            found = self.verify(1)
            self.assertEqual(found['pages'], 0, found)
            self.assertEqual([(d['section'], d['instance'], d['field'])
                              for d in found['devices']],
                             [('cpu', 0, field)])
            self.vm.cmd('x-snapshot-device-restore', slot=1)
            self.assert_same(self.verify(1), 'restored')
        self.assertEqual(gdb.flip_byte(0x123456), 'OK')
        found = self.verify(1)
        self.assertEqual(found['fields'], 0, found)
        self.assertEqual(found['ram'], [{'block': 'pc.ram', 'offset': 0x123000,
                                         'byte': 0x456, 'count': 1}])
        self.vm.cmd('x-snapshot-device-restore', slot=1)
        self.assert_same(self.verify(1), 'restored')
        gdb.close()
        self.vm.shutdown()

    def test_pc_dirty(self):
        self.faults('pc', 'dirty')

    def test_q35_remap(self):
        self.faults('q35', 'remap')


class Determinism(Machine):
    """
    With instructions counted, all that a machine does after a restore follows
    from what was restored. Slot 1 is saved when the guest arrives at some
    place after the restore of slot 0, and the machine must be the same, bit
    for bit, each time that it arrives there again. Catches what is neither in
    RAM nor in a device's migration state: translated code, timers, whose turn
    it is.
    """

    def arrivals(self, count):
        self.wait_for_event('STOP')
        self.vm.cmd('x-snapshot-device-save', slot=1)
        for i in range(1, count):
            self.vm.cmd('cont')
            self.wait_for_event('STOP')
            self.assert_same(self.verify(1), f'arrival {i}')
        self.log.info('%d arrivals', count)
        self.vm.shutdown()

    def exact(self, machine, cpus, ram='dirty'):
        self.bare_metal(machine, 'exact', *self.EXACT, cpus=cpus,
                        device=f'snapshot,ram={ram}')
        self.arrivals(self.ARRIVALS)

    def test_pc(self):
        self.exact('pc', 1)

    def test_pc_smp2(self):
        self.exact('pc', 2)

    def test_pc_remap(self):
        self.exact('pc', 1, 'remap')

    def test_q35(self):
        self.exact('q35', 1)

    def test_q35_smp2(self):
        self.exact('q35', 2)

    def linux_exact(self, machine, *args, ram='dirty'):
        self.linux(machine, 'exact', *self.EXACT, *args,
                   device=f'snapshot,ram={ram}')
        self.arrivals(self.ARRIVALS)

    def test_linux_pc(self):
        """With a network card, so that each restore resets the machine"""
        self.linux_exact('pc')

    def test_linux_q35(self):
        self.linux_exact('q35', '-nodefaults')


if __name__ == '__main__':
    QemuSystemTest.main()

# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines whose guest restores slot 0 as fast as it can, for the tests"""

import os
from pathlib import Path
import re
import time

from qemu_test import QemuSystemTest
from snapshot import build_guest


class Machine(QemuSystemTest):
    """
    What the tests share: a guest that restores slot 0 for ever. Slots
    1 and 2 are the host's, for two states of the machine that differ.
    """

    BOTH = ('pc', 'snapshot,ram=dirty'), ('q35', 'snapshot,ram=remap')

    # How much slower, and larger, a QEMU with sanitizers is
    PATIENCE = int(os.getenv('QEMU_TEST_SNAPSHOT_PATIENCE', '1'))

    # After what time something that should happen is not going to
    DEADLINE = 60 * PATIENCE

    def start(self, device, *args, machine='pc', accel='tcg', cpus=1,
              case='storm', options='', wrapper=(), env=None):
        self.require_accelerator(accel)
        self.require_device('name "snapshot"')
        self.console = Path(self.scratch_file('console'))
        guest = self.scratch_file('guest.elf')
        if not Path(guest).exists():
            build_guest(guest)
        for vm in self._vms.values():
            vm.shutdown()
        self._vms.clear()
        vm = self.vm
        # pylint: disable=protected-access
        vm._wrapper = wrapper
        vm._qmp_timer = self.DEADLINE
        vm.set_machine(machine)
        vm.add_args('-nodefaults', '-accel', accel, '-m', '16', '-smp',
                    str(cpus), '-rtc', 'clock=vm', '-kernel', guest,
                    '-append', f'case={case} cpus={cpus} {options}',
                    '-chardev', f'file,id=debug,path={self.console}',
                    '-device', 'isa-debugcon,iobase=0xe9,chardev=debug',
                    '-device', 'isa-debug-exit,iobase=0xf4,iosize=4',
                    '-device', device, *args)
        before = dict(os.environ)
        os.environ.update(env or {})
        try:
            vm.launch()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def command(self, name, slot):
        """What went wrong, if something did"""
        reply = self.vm.qmp(f'x-snapshot-device-{name}', slot=slot)
        return reply.get('error', {}).get('desc')

    def query(self):
        return self.vm.cmd('x-query-snapshot-device')

    def assert_state(self, state):
        self.assertEqual(self.vm.cmd('query-status')['status'], state)

    def assert_exact(self, slot):
        found = self.vm.cmd('x-snapshot-device-verify', slot=slot)
        self.assertEqual((found['pages'], found['fields']), (0, 0), found)

    def assert_restores(self, *slots):
        """Old snapshots are as good as they were."""
        for slot in slots:
            self.assertIsNone(self.command('restore', slot))
            self.assert_exact(slot)

    def assert_alive(self, more=20):
        """The guest runs: it goes on restoring."""
        first = self.query()['restores']
        end = time.monotonic() + self.DEADLINE
        while self.query()['restores'] < first + more:
            self.assertLess(time.monotonic(), end, 'the guest stands still')
            time.sleep(0.002)

    def save_two_states(self):
        """In slots 1 and 2, wherever between its restores the guest is then"""
        self.assert_alive()
        self.vm.cmd('stop')
        self.assertIsNone(self.command('save', 1))
        end = time.monotonic() + self.DEADLINE
        differ = 0
        while not differ:
            self.assertLess(time.monotonic(), end, 'there is but one state')
            self.vm.cmd('cont')
            self.assert_alive(1)
            self.vm.cmd('stop')
            self.assertIsNone(self.command('save', 2))
            differ = self.vm.cmd('x-snapshot-device-verify', slot=1)['fields']

    def image(self):
        """The file that QEMU has RAM images in, by its descriptor"""
        for fd in Path(f'/proc/{self.vm.get_pid()}/fd').iterdir():
            if re.search('snapshot-ram|/image', os.readlink(fd)):
                return fd
        self.fail('no image')


class Storm(Machine):
    """CPUs restore as fast as they can."""

    def storm(self, device, machine, *args, cpus=4, **options):
        self.start(f'{device},verify=100', *args, machine=machine,
                   cpus=cpus, **options)
        self.assert_alive()

    def assert_no_mismatch(self):
        self.assert_alive()
        self.vm.cmd('stop')
        self.assert_restores(0)
        info = self.query()
        self.assertEqual(info['mismatched'], 0, info['mismatches'])
        self.assertEqual(self.console.read_text(), '')

    def wait_for_migration(self, status, meanwhile=lambda: time.sleep(0.01)):
        end = time.monotonic() + self.DEADLINE
        while self.vm.cmd('query-migrate')['status'] != status:
            self.assertLess(time.monotonic(), end, f'migration not {status}')
            meanwhile()

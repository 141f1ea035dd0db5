#!/usr/bin/env python3
#
# Functional test of the snapshot device: every command at every moment of a
# machine that runs
#
# SPDX-License-Identifier: GPL-2.0-or-later

import contextlib
import os
import random
import subprocess
import time

from qemu_test import QemuSystemTest
from snapshot.storm import Storm


class AnyMoment(Storm):
    """
    The guest's CPUs restore as fast as they can, whether there is something to
    restore or not, while the host uses each command that has to do with the
    machine's state, for QEMU_TEST_SNAPSHOT_SECONDS. Catches an end of QEMU, a
    deadlock, a device that stays busy, a machine that stands still, and one
    that is a mixture of two.
    """

    SECONDS = int(os.getenv('QEMU_TEST_SNAPSHOT_SECONDS', '6'))

    # What a command may say that comes at the wrong moment
    REFUSALS = ('no snapshot in slot', "command of the guest's",
                'migration is in progress', 'was, migrated')

    def vmstate(self):
        """Options for a place for savevm, which is no disk of the guest's"""
        image = self.scratch_file('vmstate.qcow2')
        if not os.path.exists(image):
            subprocess.run([os.environ['QEMU_TEST_QEMU_IMG'], 'create', '-q',
                            '-f', 'qcow2', image, '1G'], check=True)
        return ('-blockdev', 'driver=qcow2,node-name=vmstate,file.driver=file,'
                             f'file.filename={image}')

    @contextlib.contextmanager
    def busy_host(self, processes=6):
        """That has other things to do as well"""
        loops = [subprocess.Popen(['sh', '-c', 'while :; do :; done'])
                 for _ in range(processes)]
        try:
            yield
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()

    def human(self, line):
        said = self.vm.cmd('human-monitor-command', command_line=line)
        self.assertNotIn('rror', said)

    def slot_command(self, name, slot):
        error = self.command(name, slot)
        if error is not None:
            self.assertTrue(any(r in error for r in self.REFUSALS), error)

    def migrate(self):
        """To nowhere; then the guest runs on here."""
        self.vm.cmd('migrate', uri='exec:cat >/dev/null')
        self.wait_for_migration('completed',
                                lambda: self.slot_command('restore', 0))
        self.vm.cmd('cont')

    def stop(self):
        self.vm.cmd('stop')
        self.slot_command('restore', 0)
        self.vm.cmd('cont')

    def savevm(self):
        self.human('savevm one')
        self.has_vmstate = True

    def loadvm(self):
        """What was saved before is as good as it was."""
        if self.has_vmstate:
            self.vm.cmd('stop')
            self.human('loadvm one')
            for saved in self.query()['saved']:
                self.assert_restores(saved['slot'])
            self.human('loadvm one')
            self.vm.cmd('cont')

    def any_moment(self, device, machine, slots, cpus):
        rng = random.Random(1)
        done = {}
        self.has_vmstate = False
        self.storm(f'{device},slots={slots}', machine, *self.vmstate(),
                   cpus=cpus)
        others = (lambda: self.vm.cmd('system_reset'), self.stop, self.migrate,
                  self.savevm, self.loadvm, self.query)
        start = time.monotonic()
        while time.monotonic() < start + self.SECONDS:
            n = rng.randrange(20)
            if n < len(others):
                others[n]()
            else:
                name = rng.choice(('save', 'restore', 'restore', 'discard',
                                   'verify'))
                self.slot_command(name, rng.randrange(slots))
                n = name
            done[n] = done.get(n, 0) + 1
            self.assert_state('running')
            time.sleep(rng.choice((0, 0, 0.001, 0.01)))
        self.log.info('%s: %s', device, done)
        # It saves slot 0 when it boots.
        self.vm.cmd('system_reset')
        self.assert_no_mismatch()
        self.assertGreater(self.query()['verified'], 0)

    def test_one_slot(self):
        """The last one is discarded, and with it all that was logged."""
        self.any_moment('snapshot,ram=dirty', 'pc', 1, 1)

    def test_one_slot_smp(self):
        self.any_moment('snapshot,ram=dirty', 'q35', 1, 4)

    def test_slots(self):
        self.any_moment('snapshot,ram=dirty', 'pc', 4, 2)

    def test_remap(self):
        self.any_moment('snapshot,ram=remap', 'q35', 4, 2)

    def test_precise(self):
        """
        The guest's store falls into a savevm of the host's, which stops all
        vCPUs and resumes them, before the main loop has come to the request.
        Catches a vCPU that runs on behind its store.
        """
        self.start('snapshot,ram=dirty', '-action', 'shutdown=pause',
                   *self.vmstate(), case='precise', cpus=2, options='n=1000')
        while self.vm.cmd('query-status')['status'] != 'shutdown':
            self.vm.cmd('human-monitor-command', command_line='savevm one')
        self.assertEqual(self.console.read_text(), 'PASS precise\n')

    def test_resets_on_a_busy_host(self):
        """A reset meets a request that no CPU has come to yet."""
        for machine, device in self.BOTH:
            self.storm(device, machine, cpus=2)
            with self.busy_host():
                for _ in range(15):
                    self.vm.cmd('system_reset')
                    self.assert_alive(5)
            self.assert_no_mismatch()


if __name__ == '__main__':
    QemuSystemTest.main()

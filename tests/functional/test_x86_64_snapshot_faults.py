#!/usr/bin/env python3
#
# Functional test of the snapshot device on a host that is short of something,
# and of commands that come, or end, at any moment
#
# SPDX-License-Identifier: GPL-2.0-or-later

import mmap
import os
from pathlib import Path
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import time

from qemu_test import QemuSystemTest
from snapshot import kvm_copies_page_tables
from snapshot.storm import Machine, Storm

HERE = Path(__file__).resolve().parent


class SystemCalls(Machine):
    """
    Each system call that a command makes for RAM or its image fails once.
    Catches an end of QEMU, a command that fails without saying why or succeeds
    without success, and a machine, or a snapshot, that is not as it was before.
    """

    PLAN = struct.Struct('24sii')
    shared = None

    CALLS = ('memfd_create', 'mmap', 'mremap', 'mremap, fixed', 'madvise',
             'ftruncate', 'fallocate', 'fallocate, punch', 'pwrite')

    def preload(self):
        """The environment for QEMU, which will do as planned"""
        library = self.scratch_file('faults.so')
        plan = self.scratch_file('plan')
        if self.shared is None:
            subprocess.run(['gcc', '-O1', '-Wall', '-Werror', '-shared',
                            '-fPIC', '-o', library,
                            HERE / 'snapshot-host' / 'faults.c', '-ldl'],
                           check=True)
            Path(plan).write_bytes(bytes(self.PLAN.size))
            with open(plan, 'rb+') as f:
                self.shared = mmap.mmap(f.fileno(), 0)
        return {'LD_PRELOAD': library, 'SNAPSHOT_FAULTS': plan,
                'ASAN_OPTIONS': os.getenv('ASAN_OPTIONS', '') +
                                ':verify_asan_link_order=0'}

    def plan(self, call='', n=0, half=False):
        """The nth call shall fail, or write half."""
        self.shared[:] = self.PLAN.pack(call.encode(), n, half)

    def was_carried_out(self):
        return self.PLAN.unpack(self.shared[:])[1] == 0

    def each_fault(self, name, slot, check, calls=CALLS, half=False):
        """
        Run a command again and again, each time with another call that fails;
        where there are many, not each one. Returns the calls, with the errors.
        """
        errors = {}
        for call in calls:
            n = 1
            done = True
            while done:
                self.plan(call, n, half)
                error = self.command(name, slot)
                done = self.was_carried_out()
                self.plan()
                if not done or half:
                    self.assertIsNone(error)
                if error is not None:
                    self.assertIn('RAM image', error)
                    self.assertRegex(error, 'Cannot allocate|No space')
                if done:
                    errors[call] = error
                check(call, error)
                n += 1 + n // 4
        self.log.info('%s %d: %s', name, slot, errors)
        return errors

    def check_first_save(self, device):
        def check(_, error):
            if error is None:
                self.assert_exact(1)
                self.assertIsNone(self.command('discard', 1))
            self.assert_state('prelaunch')
            self.assertEqual(self.query()['saved'], [])

        for call in 'mmap', 'ftruncate', 'pwrite':
            self.start(device, '-S', env=self.preload())
            errors = self.each_fault('save', 1, check, [call])
            self.assertIsNotNone(errors[call])
        self.assertTrue(self.each_fault('save', 1, check, [call], half=True))
        self.vm.cmd('cont')
        self.assert_alive()

    def check_commands(self, device, machine):
        def check(call, error):
            """The machine was and, unless it was restored, is in state 1."""
            if call == 'mremap, fixed' and error is not None:
                # The one fault that comes too late: see the user's guide.
                self.assertIn('Moving', error)
                self.assert_state('internal-error')
                self.assertIn('Reset', self.vm.qmp('cont')['error']['desc'])
            else:
                self.assert_state('paused')
                if error is not None:
                    self.assert_exact(1)
            self.assert_restores(2, 1)
            if name == 'discard':
                self.assertIsNone(self.command('save', slot))
            self.vm.cmd('cont')
            self.assert_alive(5)
            self.vm.cmd('stop')
            self.assert_restores(1)

        self.start(device, machine=machine, env=self.preload())
        self.save_two_states()
        self.assert_restores(1)
        for name, slot in (('save', 3), ('save', 1), ('restore', 2),
                           ('restore', 1), ('discard', 3)):
            errors = self.each_fault(name, slot, check)
            if name == 'save' and 'remap' in device:
                self.assertIsNotNone(errors['pwrite'])
            if (name, slot) == ('restore', 2) and 'remap' in device:
                self.assertIsNotNone(errors['mmap'])
                self.assertIsNotNone(errors['mremap, fixed'])
        self.assert_restores(2, 1)

    def test_dirty(self):
        self.check_first_save('snapshot,ram=dirty')
        self.check_commands('snapshot,ram=dirty', 'pc')

    def test_remap(self):
        self.check_first_save('snapshot,ram=remap')
        self.check_commands('snapshot,ram=remap', 'q35')

    def test_file(self):
        file = self.scratch_file('image')
        for ram in ('dirty', 'remap'):
            self.check_first_save(f'snapshot,ram={ram},file={file}')
            self.check_commands(f'snapshot,ram={ram},file={file}', 'pc')

    def test_no_start(self):
        """QEMU ends at the start, and says why, if it has no file for RAM."""
        env = self.preload()
        ends = 0
        for n in range(1, 10):
            self.plan('memfd_create', n)
            try:
                self.start('snapshot', env=env)
            except Exception as e:      # pylint: disable=broad-except
                ends += 1
                self.assertEqual(self.vm.exitcode(), 1, e)
                self.assertIn('-device snapshot: failed to create memfd',
                              self.vm.get_log())
                self.assertIn('Too many open files', self.vm.get_log())
            if not self.was_carried_out():
                break
        self.assertEqual(ends, 1)


class Resources(Machine):
    """A host that is really short of something; an image that others reach"""

    # A file system for four images, which only QEMU sees
    FULL = ('unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=80m none '
            '"$0" && exec "$@"')

    def fill(self, path):
        """Take all space there is; returns the file to remove."""
        filler = Path(f'/proc/{self.vm.get_pid()}/root{path}/filler')
        with open(filler, 'wb', buffering=0) as f:
            for size in 1 << 20, 1 << 12:
                with self.assertRaises(OSError):
                    while f.write(bytes(size)) == size:
                        pass
                    f.write(bytes(1))
        return filler

    def test_no_space(self):
        """
        The file system is full. Catches a bus error for a page of the image
        that there is no space for.
        """
        path = self.scratch_file('full')
        os.mkdir(path)
        wrapper = (*self.FULL, path)
        if subprocess.run([*wrapper, 'true'], stderr=subprocess.PIPE,
                          check=False).returncode:
            self.skipTest('no right to mount a tmpfs')
        for machine, device in self.BOTH:
            self.start(f'{device},file={path}/image', '-S', machine=machine,
                       wrapper=wrapper)
            # Full before anything of the image was read
            self.assertIsNone(self.command('save', 1))
            filler = self.fill(path)
            self.assert_restores(1)
            filler.unlink()
            self.vm.cmd('cont')
            self.save_two_states()
            filler = self.fill(path)
            error = None
            for _ in range(100):        # until there is enough to write
                self.vm.cmd('cont')
                self.assert_alive(1)
                self.vm.cmd('stop')
                error = self.command('save', 3)
                if error:
                    break
            self.assertIn('RAM image', error)
            self.assertIn('No space left', error)
            self.assert_state('paused')
            self.assert_restores(1, 2)
            filler.unlink()
            self.assertIsNone(self.command('save', 3))
            self.assert_restores(1, 2, 3)
            self.vm.cmd('cont')
            self.assert_alive()

    def test_no_descriptors(self):
        """Commands open no files, so that they need none."""
        for machine, device in self.BOTH:
            self.start(device, machine=machine)
            self.save_two_states()
            pid = self.vm.get_pid()
            used = {int(fd) for fd in os.listdir(f'/proc/{pid}/fd')}
            unused = min(set(range(len(used) + 1)) - used)
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (unused, limits[1]))
            self.assertIsNone(self.command('save', 3))
            self.assert_restores(1, 2, 3)
            self.vm.cmd('cont')
            self.assert_alive()

    def test_sealed(self):
        """Anonymous memory does not get smaller."""
        for machine, device in self.BOTH:
            self.start(device, machine=machine)
            self.save_two_states()
            with self.assertRaises(PermissionError):
                os.truncate(self.image(), 0)
            self.assert_restores(1, 2)

    def test_truncated(self):
        """
        Another process truncates the file. Catches a bus error, and a machine
        that is not as it was. RAM that is mapped from it could not live on.
        """
        path = self.scratch_file('image')
        self.start(f'snapshot,ram=dirty,file={path}')
        self.vm.cmd('stop')
        self.assertIsNone(self.command('save', 1))
        size = os.stat(path).st_size
        for shorter in size - 1, 0:
            os.truncate(path, shorter)
            for name in 'restore', 'save', 'verify':
                self.assertIn('was truncated', self.command(name, 1))
                self.assert_state('paused')
        self.assertIsNone(self.command('discard', 1))
        self.assert_state('paused')


class Interrupted(Storm):
    """
    Something happens in the middle of restores. Catches a deadlock, and a
    machine that is left between two states.
    """

    def test_stopped_process(self):
        for machine, device in self.BOTH:
            self.storm(device, machine)
            for _ in range(20):
                os.kill(self.vm.get_pid(), signal.SIGSTOP)
                time.sleep(0.02)
                os.kill(self.vm.get_pid(), signal.SIGCONT)
                self.assert_alive(1)
            self.assert_no_mismatch()

    def test_client_gone(self):
        """A client that does not wait for the answers to its commands"""
        path = f'{self.socket_dir().name}/qmp'
        for machine, device in self.BOTH:
            self.storm(device, machine, '-qmp',
                       f'unix:{path},server=on,wait=off')
            self.assertIsNone(self.command('save', 1))
            for i in range(50):
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(self.DEADLINE)
                    client.connect(path)
                    client.recv(4096)
                    client.sendall(b'{"execute": "qmp_capabilities"}')
                    client.recv(4096)
                    for name in ('restore', 'save', 'verify')[:1 + i % 3]:
                        client.sendall(b'{"execute": "x-snapshot-device-%s", '
                                       b'"arguments": {"slot": 1}}'
                                       % name.encode())
                    time.sleep(i % 5 / 1000)
            self.assertIsNone(self.command('restore', 1))
            self.assert_no_mismatch()

    def test_migration(self):
        """Commands are refused while it runs, and work when that is over."""
        for machine, device in self.BOTH:
            self.storm(device, machine)
            self.vm.cmd('migrate-set-parameters', max_bandwidth=4096)
            self.vm.cmd('migrate', uri='exec:cat >/dev/null')
            self.wait_for_migration('active')
            for name in 'save', 'restore':
                self.assertRegex(str(self.command(name, 0)),
                                 'migration is in progress')
            restores = self.query()['restores']
            time.sleep(0.1)
            self.assertEqual(self.query()['restores'], restores)
            self.vm.cmd('migrate_cancel')
            self.wait_for_migration('cancelled')
            self.assert_no_mismatch()

    def assert_ends(self, code):
        self.vm.wait(timeout=self.DEADLINE)
        self.assertEqual(self.vm.exitcode(), code, self.vm.get_log())

    def test_quit(self):
        for machine, device in self.BOTH:
            for end in 'quit', signal.SIGTERM:
                self.storm(device, machine)
                if end == 'quit':
                    self.vm.qmp('quit')
                else:
                    os.kill(self.vm.get_pid(), end)
                self.assert_ends(0)

    def test_guest_ends(self):
        """By power management, and with isa-debug-exit"""
        for machine, device in self.BOTH:
            for end, code in (1, 0), (2, 33):
                self.start(device, machine=machine, cpus=4,
                           options=f'after=100 end={end}')
                self.assert_ends(code)

    def test_guest_ends_paused(self):
        """Back from the power being off"""
        for machine, device in self.BOTH:
            self.start(device, '-action', 'shutdown=pause', machine=machine,
                       options='after=200 end=1')
            self.assertIsNotNone(
                self.vm.event_wait('SHUTDOWN', timeout=self.DEADLINE))
            self.assertIsNotNone(
                self.vm.event_wait('STOP', timeout=self.DEADLINE))
            self.assert_state('shutdown')
            self.assertIn('stopped until its next reset',
                          self.command('save', 1))
            self.assert_restores(0)
            self.vm.cmd('cont')
            self.assertIsNotNone(
                self.vm.event_wait('SHUTDOWN', timeout=self.DEADLINE))


class TwoSides(Storm):
    """
    All CPUs and the host command as fast as they can, for
    QEMU_TEST_SNAPSHOT_SECONDS. Catches a deadlock, commands that upset each
    other, and what grows.
    """

    SECONDS = int(os.getenv('QEMU_TEST_SNAPSHOT_SECONDS', '10'))

    # s; without, the host keeps the guest from running where KVM emulates it
    PAUSE = 0.05

    def sizes(self):
        """KiB of QEMU's own memory and of the image; open files"""
        self.vm.cmd('stop')
        self.assertIsNone(self.command('restore', 0))
        proc = Path(f'/proc/{self.vm.get_pid()}')
        memory = []
        for _ in range(3):
            time.sleep(1)       # The RCU thread frees what it has to.
            text = (proc / 'smaps_rollup').read_text()
            memory.append(int(re.search(r'^Anonymous: +(\d+)', text,
                                        re.M).group(1)))
        sizes = (min(memory), os.stat(self.image()).st_blocks // 2,
                 len(os.listdir(proc / 'fd')))
        self.vm.cmd('cont')
        return sizes

    def host(self, rng, done):
        """One command. Slot 0 is the guest's, the others may be empty."""
        slot = rng.randrange(4)
        name = rng.choices(('restore', 'save', 'discard', 'verify'),
                           (80, 10, 5, 5))[0]
        if slot == 0 and name in ('save', 'discard'):
            name = 'restore'
        error = self.command(name, slot)
        if error is not None:
            self.assertIn(f'no snapshot in slot {slot}', error)
        else:
            done[name] = done.get(name, 0) + 1

    def both(self, device, machine, pause=0, **options):
        rng = random.Random(1)
        done = {}
        early = None
        self.storm(device, machine, **options)
        start = time.monotonic()
        progress = start
        restores = 0
        while time.monotonic() < start + self.SECONDS or len(done) < 4:
            try:
                self.host(rng, done)
                time.sleep(rng.uniform(0, pause))
            except TimeoutError:
                self.fail(f'deadlock: no answer in {self.DEADLINE} s, after '
                          f'{time.monotonic() - start:.0f} s, {done}')
            if time.monotonic() > progress + self.SECONDS / 5:
                info = self.query()
                guest = info['restores'] - done.get('restore', 0)
                self.assertGreater(guest, restores, 'the guest stands still')
                restores = guest
                early = early or self.sizes()
                progress = time.monotonic()
        late = self.sizes()
        self.log.info('%s: %d restores, %s by the host; %s, later %s', device,
                      self.query()['restores'], done, early, late)
        self.assert_no_mismatch()
        self.assertGreater(self.query()['verified'], 0)
        # Not what the guest has, but what is left over in each restore
        self.assertLess(late[0] - early[0], 2048 * self.PATIENCE)
        self.assertLess(late[1], 4 * 18 * 1024)
        self.assertEqual(late[2], early[2])

    def test_dirty(self):
        self.both('snapshot,ram=dirty', 'pc')

    def test_remap(self):
        self.both('snapshot,ram=remap', 'q35')

    def require_kvm(self):
        if kvm_copies_page_tables():
            self.skipTest('ram=dirty is refused: this KVM has no '
                          'two-dimensional paging')

    def test_kvm(self):
        """A vCPU that restores on its own thread, another in the main loop"""
        self.require_kvm()
        self.both('snapshot,ram=dirty', 'pc', self.PAUSE, accel='kvm', cpus=1)

    def test_kvm_smp(self):
        self.require_kvm()
        self.both('snapshot,ram=dirty', 'q35', self.PAUSE, accel='kvm', cpus=2)


if __name__ == '__main__':
    QemuSystemTest.main()

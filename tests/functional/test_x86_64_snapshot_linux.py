#!/usr/bin/env python3
#
# Functional test of the snapshot device on a Linux guest
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
import random
import re
import time

from qemu_test import QemuSystemTest


class SnapshotLinux(QemuSystemTest):
    """
    Programs in a Linux guest save and restore it. Their sources lie in
    tests/functional/snapshot-linux and contrib/snapshot; scripts/linux-guest
    packs them with a kernel. QEMU_TEST_SNAPSHOT_LINUX names the directory
    with vmlinuz and initramfs if it is not the repository's build/linux.
    """

    # What a kernel says that finds its time or memory to be wrong. Not among
    # it is a clock source that is "unstable" for its read-back delay: that
    # comes of a busy host, with no restore at all.
    COMPLAINTS = re.compile(r'skew is too large|backwards|soft lockup|'
                            r'rcu.*stall|blocked for more|BUG:|Oops|WARNING:|'
                            r'Call Trace|Kernel panic|segfault')

    def setUp(self):
        super().setUp()
        self.serial = Path(self.log_file('serial.log'))
        self.serial.unlink(missing_ok=True)

    def boot(self, machine, run, *args, kernel=''):
        """
        Start a guest that runs @run, words with commas between them; @kernel
        are more options of the kernel's.
        """
        linux = os.getenv('QEMU_TEST_SNAPSHOT_LINUX')
        if linux:
            linux = Path(linux)
        else:
            linux = Path(__file__).resolve().parents[2] / 'build' / 'linux'
        if not (linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {linux}: run scripts/linux-guest')

        self.require_device('name "snapshot"')
        self.set_machine(machine)
        self.vm.add_args('-accel', 'tcg', '-m', '256', '-no-reboot',
                         '-serial', f'file:{self.serial}',
                         '-kernel', str(linux / 'vmlinuz'),
                         '-initrd', str(linux / 'initramfs'),
                         '-append', 'console=ttyS0 panic=-1 no_timer_check '
                                    f'{kernel} '
                                    f'snapshot.run={run}', *args)
        self.vm.launch()

    def output(self):
        """What the guest has printed so far, one string a line."""
        try:
            text = self.serial.read_text(errors='replace')
        except FileNotFoundError:
            return []
        return text.replace('\r', '').split('\n')

    def wait_for_line(self, line, timeout=300):
        end = time.monotonic() + timeout
        while line not in self.output():
            self.assertTrue(self.vm.is_running(), f'QEMU ended before: {line}')
            self.assertLess(time.monotonic(), end, f'no line: {line}')
            time.sleep(0.02)

    def finish(self, timeout=600):
        """Let the guest end by itself; it must be content. Its output."""
        self.vm.wait(timeout=timeout)
        output = self.output()
        program = [l for l in output if re.match('guest: .* exited', l)]
        self.assertEqual(len(program), 1, output[-20:])
        start = output.index('guest: go')
        complaints = [l for l in output[start:] if self.COMPLAINTS.search(l)]
        self.assertEqual(complaints, [])
        self.assertRegex(program[0], r' exited with 0$', output[-20:])
        return output

    # The program of the 2022 mail

    def do_demo(self, machine, *args):
        self.boot(machine, 'demo,100', '-device', 'snapshot', *args)
        output = self.finish()
        told = [l for l in output if re.match(r'before:|middle:|after:', l)]
        want = [r'before: a = 0$', r'middle: a = 1$',
                r'before: a = 0, by restore 1, [1-9]\d* us$',
                r'middle: a = 1$',
                r'before: a = 0, by restore 2, [1-9]\d* us$',
                r'middle: a = 1$',
                r'before: a = 0, by restore 3, [1-9]\d* us$',
                r'after:  a = 0, by restore 100; [1-9]\d* us each$']
        self.assertEqual(len(told), len(want), told)
        for line, pattern in zip(told, want):
            self.assertRegex(line, pattern)

    def test_demo_pc(self):
        self.do_demo('pc')

    def test_demo_q35(self):
        self.do_demo('q35')

    def test_demo_icount(self):
        self.do_demo('pc', '-icount', 'shift=3,sleep=off')

    # A workload whose result must not depend on how often it is restored

    def do_work(self, machine, *args, restores=1000):
        self.boot(machine, f'work,guest,{restores},10', '-device', 'snapshot',
                  *args)
        output = self.finish()
        self.assertIn('work: same result', output)
        restored = [l for l in output if l.startswith('work: restored ')]
        self.assertEqual(len(restored), 1)
        self.assertIn(f'restored {restores} times, to 10 saves', restored[0])

    def test_work_pc(self):
        self.do_work('pc', '-smp', '1')

    def test_work_pc_smp(self):
        self.do_work('pc', '-smp', '2', restores=300)

    def test_work_q35(self):
        self.do_work('q35', '-smp', '1', restores=300)

    def test_work_q35_smp(self):
        self.do_work('q35', '-smp', '2')

    def disk(self):
        """Options for a disk that the guest reads all the time"""
        disk = self.scratch_file('disk')
        with open(disk, 'wb') as f:
            f.write(random.Random(2).randbytes(16 << 20))
        return '-drive', f'if=virtio,format=raw,readonly=on,file={disk}'

    def test_work_virtio(self):
        self.do_work('q35', '-smp', '2', '-device', 'virtio-net-pci',
                     *self.disk(), restores=300)
        disks = [l for l in self.output() if l.startswith('work: disk ')]
        self.assertNotRegex(disks[0], ' 0000000000000000')

    def do_work_host(self, machine, *args, saves=10, restores=300, kernel=''):
        """
        The same, at moments that no program in the guest chose: in the midst
        of an interrupt, of a page fault, of a fork.
        """
        # Seeded, so that a failure has a chance to come back
        rng = random.Random(1)

        self.boot(machine, 'work,host', '-device', 'snapshot', *args,
                  kernel=kernel)
        self.wait_for_line('work: go')
        for save in range(saves):
            time.sleep(rng.uniform(0, 0.03))
            self.vm.cmd('x-snapshot-device-save', slot=save % 3)
            for i in range(restores // saves):
                # Now and then long enough for damage to show, but then not
                # before the next save, which lets the guest get on
                time.sleep(rng.uniform(0, 0.01 if i % 10 else 0.1))
                self.vm.cmd('x-snapshot-device-restore', slot=save % 3)
        self.assertNotIn('work: same result', self.output(), 'ended too early')
        self.assertIn('work: same result', self.finish())

    def test_work_host_pc(self):
        self.do_work_host('pc', '-smp', '1')

    def test_work_host_pc_smp(self):
        self.do_work_host('pc', '-smp', '2')

    def test_work_host_q35(self):
        self.do_work_host('q35', '-smp', '1')

    def test_work_host_q35_smp(self):
        self.do_work_host('q35', '-smp', '2')

    def test_work_host_intx(self):
        """
        The disk interrupts by INTx, at any moment. Catches a bus whose count
        of interrupts is not that of its devices.
        """
        self.do_work_host('pc', '-nodefaults', *self.disk(), kernel='pci=nomsi')

    def test_work_intx(self):
        self.boot('q35', 'work,guest,300,10', '-device', 'snapshot',
                  '-nodefaults', '-smp', '2', *self.disk(), kernel='pci=nomsi')
        self.assertIn('work: same result', self.finish())

    # Clocks go on from the save, and a pending timer fires each time

    def do_clock(self, machine, *args, restores=1000):
        """
        Of each return from the save, in microseconds since that: what the
        monotonic clock and the wall clock show, and when a timer fires.
        """
        self.boot(machine, f'clock,{restores}', '-device', 'snapshot', *args)
        lines = [[int(word) for word in line.split()[1:]]
                 for line in self.finish() if line.startswith('clock: ')]
        count, mono, wall, fired = zip(*lines)
        self.assertEqual(list(count), list(range(restores + 1)))
        self.assertGreaterEqual(min(fired), 5000)
        return mono, wall, fired

    def do_clock_realtime(self, *args, **kwargs):
        """
        The clock runs while the host translates the guest's code or does
        something else, so readings scatter. The least of them do not.
        """
        mono, wall, _ = self.do_clock(*args, **kwargs)
        for name, first in ('monotonic', mono), ('wall', wall):
            early, late = min(first[1:101]), min(first[-100:])
            self.log.info('%s clock: %d us after the save, later %d us',
                          name, early, late)
            self.assertGreaterEqual(min(first), 0)
            self.assertLess(sorted(first)[len(first) // 2], 500000)
            self.assertLess(abs(late - early), 15000, f'{name} clock creeps')

    def test_clock_pc(self):
        self.do_clock_realtime('pc', '-smp', '1')

    def test_clock_q35_smp(self):
        self.do_clock_realtime('q35', '-smp', '2', restores=200)

    def test_clock_icount(self):
        """
        Where the clock counts instructions, the same is read each time, but
        for the save, as snapshot_save() does a little more after a restore.
        """
        for times in self.do_clock('pc', '-icount', 'shift=3,sleep=off'):
            self.assertEqual(set(times[1:]), {times[1]})
            self.assertLess(times[1] - times[0], 100)

    # A disk that the guest writes to

    def do_disk(self, machine, drive, *args, restores=50):
        """
        The guest writes, saves, reads, writes something else, and restores.
        Catches a disk that does not go back, or not in the same instant as
        the guest's caches; and anything written to the image after the save.
        """
        image = Path(self.scratch_file('disk'))
        with open(image, 'wb') as f:
            f.truncate(16 << 20)
        self.boot(machine, f'disk,{restores}', '-device', 'snapshot,verify=on',
                  '-drive', f'{drive},format=raw,file={image}', *args)
        self.assertIn('disk: ok', self.finish())
        data = image.read_bytes()
        self.assertEqual(data[64 << 10:70 << 10], b'first\n' * 1024)
        self.assertEqual(data.strip(b'\0'), b'first\n' * 1024)

    def test_disk_pc(self):
        self.do_disk('pc', 'if=virtio')

    def test_disk_smp(self):
        self.do_disk('q35', 'if=virtio', '-smp', '2')

    def test_disk_iothread(self):
        self.do_disk('q35', 'if=none,id=d', '-object', 'iothread,id=io',
                     '-device', 'virtio-blk-pci,drive=d,iothread=io')

    # The command-line tool

    def test_ctl(self):
        self.boot('pc', 'ctl', '-device', 'snapshot')
        self.assertIn('ctl: ok', self.finish())

    def test_absent(self):
        self.boot('pc', 'snapshotctl,info')
        self.vm.wait(timeout=300)
        output = self.output()
        self.assertIn('snapshotctl: no snapshot device: start QEMU with '
                      '-device snapshot', output)
        self.assertIn('guest: snapshotctl exited with 1', output)


if __name__ == '__main__':
    QemuSystemTest.main()

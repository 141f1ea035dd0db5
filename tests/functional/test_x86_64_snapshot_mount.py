#!/usr/bin/env python3
#
# Functional test of the runners for kernel targets in contrib/snapshot
#
# snapshot-mount and snapshot-write run in a Linux guest of scripts/linux-guest,
# whose kernel is Debian's as it is: QEMU counts the edges.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import base64
import os
from pathlib import Path
import random
import time

from snapshot.machines import MachinesTest, ROOT


# A squashfs of a file and a symbolic link, made by mksquashfs -b 4096 -nopad
# -all-root -noI -noId -noD -noF -noX -no-xattrs -mkfs-time 0 -all-time 0
IMAGE = base64.b64decode("""
aHNxcwMAAAAAAAAAABAAAAEAAAABAAwAywMBAAQAAAA9AAAAAAAAADYBAAAAAAAALg
EAAAAAAAD//////////2YAAAAAAAAAxQAAAAAAAAD+AAAAAAAAACABAAAAAAAAaGVs
bG8KXYACAKQBAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAABgAAAAMA/wEAAAAAAAAAAA
IAAAABAAAABQAAAGhlbGxvAQDtAQAAAAAAAAAAAwAAAAAAAAACAAAAKAAAAAQAAAAl
gAEAAAAAAAAAAQAAAAAAAAACAAQAaGVsbG8gAAEAAwADAGxpbmsQgGAAAAAAAAAABg
AAAQAAAADsAAAAAAAAABiAAAAAAAAAAAAgAAAAAAAAAD0AAAAAAAAABgEAAAAAAAAE
gAAAAAAoAQAAAAAAAA==
""")


class Mount(MachinesTest):

    def describe_linux(self, run, *lines, append='', name='vm'):
        linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX') or
                     ROOT / 'build' / 'linux')
        if not (linux / 'mount-modules').exists():
            self.skipTest(f'no guest in {linux}: run scripts/linux-guest')
        return self.describe(
            f'qemu = {self.qemu_bin}', 'boot = 300', 'timeout = 10000',
            'coverage = tcg,mode=kernel,interrupts=off', *lines,
            '-machine q35', '-nodefaults', '-accel tcg', '-m 128M',
            # The guest's time is its instructions', and nothing is random.
            '-icount shift=3,sleep=off', '-rtc clock=vm',
            '-cpu qemu64,-rdrand,-rdseed', '-device pvpanic',
            f'-kernel {linux}/vmlinuz', f'-initrd {linux}/initramfs',
            '-append console=ttyS0 quiet loglevel=2 nokaslr no_timer_check '
            f'oops=panic panic=-1 {append} '
            f'snapshot.run=with-modules,/lib/mount-modules,{run}', name=name)

    def both(self, vm, data):
        """What a run comes to, which is the same in another one"""
        runs = [vm.run(data) for _ in range(2)]
        seen = [(run.result, run.text, bytes(run.coverage)) for run in runs]
        self.assertEqual(runs[0].cause, self.lib.GUEST)
        self.assertEqual(seen[0], seen[1], data)
        return seen[0]

    def test_squashfs(self):
        """
        Catches a run that shows in the next one: in a cache of the kernel's, in
        the loop device, in what is left of a longer image.
        """
        lib = self.lib
        path = self.describe_linux('snapshot-mount,squashfs')
        with lib.Machine(path) as vm:
            self.assertEqual(vm.input_size, 65536)
            good = self.both(vm, IMAGE)
            self.assertEqual(good[:2], (lib.OK, '2 entries'))
            self.assertGreater(sum(map(bool, good[2])), 1000)
            empty = self.both(vm, b'')
            self.assertEqual(empty[:2], (lib.OK, 'mount: Invalid argument'))
            self.assertNotEqual(empty[2], good[2])
            # What is mounted has edges that what is refused has not.
            self.assertGreater(sum(a and not b for a, b in
                                   zip(good[2], empty[2])), 500)
            self.both(vm, bytes(65536))
            rng = random.Random(1)
            texts, maps = set(), set()
            for _ in range(60):
                data = bytearray(IMAGE)
                data[rng.randrange(len(data))] = rng.randrange(256)
                run = self.both(vm, bytes(data))
                self.assertEqual(run[0], lib.OK)
                texts.add(run[1])
                maps.add(run[2])
            self.assertIn('mount: Invalid argument', texts)
            self.assertIn('2 entries', texts)
            self.assertGreater(len(maps), 10)
            self.assertEqual(self.both(vm, IMAGE), good)

    def test_vfat(self):
        """
        Catches what the kernel has read before the first run, and takes for the
        input, and modules that are missing.
        """
        path = self.describe_linux('snapshot-mount,-w,vfat')
        # The least that is one: a FAT of 12 bits, a root directory, no files
        boot = bytearray(512)
        boot[0:3] = b'\xeb\x3c\x90'
        boot[11:24] = b'\x00\x02\x01\x01\x00\x01\x10\x00\x80\x00' \
            b'\xf8\x01\x00'
        boot[510:] = b'\x55\xaa'
        image = bytes(boot) + b'\xf8\xff\xff'
        with self.lib.Machine(path) as vm:
            run = self.both(vm, image)
            self.assertEqual(run[:2], (self.lib.OK, '0 entries'))
            # It was written to, which is undone.
            self.assertEqual(self.both(vm, image), run)
            self.assertEqual(self.both(vm, IMAGE)[1], 'mount: Invalid argument')

    def test_no_such_type(self):
        """Catches a guest that waits, or ends, without a word."""
        path = self.describe_linux('snapshot-mount,nonesuch')
        self.assert_fails('snapshot-mount: nonesuch: the kernel has no such',
                          path)

    def test_no_such_file(self):
        path = self.describe_linux('snapshot-write,/proc/nonesuch')
        self.assert_fails('snapshot-write: /proc/nonesuch: No such file', path)

    def assert_fails(self, words, path):
        with self.assertRaises(self.lib.Failure) as failure:
            self.lib.Machine(path)
        self.assertIn(words, str(failure.exception))

    def test_panic(self):
        """Catches a panic that is not told as one, or not undone."""
        lib = self.lib
        path = self.describe_linux('snapshot-write,/proc/sysrq-trigger')
        with lib.Machine(path) as vm:
            harmless = self.both(vm, b'')
            self.assertEqual(harmless[:2], (lib.OK, ''))
            for _ in range(3):
                run = vm.run(b'c')
                self.assertEqual((run.result, run.cause),
                                 (lib.CRASH, lib.PANIC))
                self.assertEqual(self.both(vm, b''), harmless)
            end = time.monotonic() + 10
            while 'sysrq triggered crash' not in lib.console(vm.directory):
                self.assertLess(time.monotonic(), end)
                time.sleep(0.01)
            self.assertIn('sysrq_handle_crash', lib.console(vm.directory))
            run = vm.run(b'b')
            self.assertEqual((run.result, run.cause), (lib.CRASH, lib.RESET))
            self.assertEqual(self.both(vm, b''), harmless)


if __name__ == '__main__':
    MachinesTest.main()

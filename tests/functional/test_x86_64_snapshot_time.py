#!/usr/bin/env python3
#
# Functional test of what is due by the guest's clock, but not the guest's own,
# when the snapshot device sets that clock
#
# SPDX-License-Identifier: GPL-2.0-or-later

from pathlib import Path
import subprocess
import time

from qemu_test import QemuSystemTest

HERE = Path(__file__).resolve().parent


class Keyboard(QemuSystemTest):
    """
    A key is held while the machine is restored. Catches a key that is let go
    when the guest's clock is where it was, by which time all keys that were
    sent since are due as well; one that is never let go, as each restore puts
    that off; and one that is let go too early by going forward.
    """

    HOLD = 0.6      # s
    PRESSED = b'\x30'
    RELEASED = b'\xb0'
    DEADLINE = 60

    def start(self, device):
        self.require_accelerator('tcg')
        self.require_device('name "snapshot"')
        objects = self.scratch_file('boot.o')
        disk = Path(self.scratch_file('disk'))
        self.console = Path(self.scratch_file('console'))
        subprocess.run(['gcc', '-m32', '-c', '-o', objects,
                        HERE / 'snapshot-bios' / 'keyboard.S'], check=True)
        subprocess.run(['ld', '-m', 'elf_i386', '-Ttext=0x7c00',
                        '--oformat', 'binary', '-e', 'start', '-o', disk,
                        objects], check=True)
        # Less is no disk for SeaBIOS.
        disk.write_bytes(disk.read_bytes().ljust(1 << 20, b'\0'))
        self.vm.set_machine('pc')
        self.vm.add_args('-nodefaults', '-accel', 'tcg', '-m', '16',
                         '-rtc', 'clock=vm', '-drive',
                         f'if=ide,format=raw,file={disk}', '-chardev',
                         f'file,id=debug,path={self.console}',
                         '-device', 'isa-debugcon,iobase=0xe9,chardev=debug',
                         '-device',
                         f'{device},slots=2,disks=keep')
        self.vm.launch()
        end = time.monotonic() + self.DEADLINE
        while not self.console.read_bytes():
            self.assertLess(time.monotonic(), end, 'no guest')
            self.press(0.02)
            time.sleep(0.3)
        # The guest is old enough to be made younger.
        self.vm.cmd('x-snapshot-device-save', slot=0)
        time.sleep(3)
        self.vm.cmd('x-snapshot-device-save', slot=1)

    def press(self, hold):
        self.vm.cmd('send-key', keys=[{'type': 'qcode', 'data': 'b'}],
                    hold_time=int(hold * 1000))

    def wait_for(self, key, sent):
        end = time.monotonic() + self.DEADLINE
        while key not in self.console.read_bytes()[sent:]:
            self.assertLess(time.monotonic(), end, 'the keyboard is dead')
            time.sleep(0.001)

    def hold(self, slot):
        """Returns how long a key is held, in s, with a restore meanwhile."""
        start = time.monotonic()
        sent = len(self.console.read_bytes())
        self.press(self.HOLD)
        self.wait_for(self.PRESSED, sent)
        self.vm.cmd('x-snapshot-device-restore', slot=slot)
        self.wait_for(self.RELEASED, sent)
        return time.monotonic() - start

    def next_key(self, *slots):
        """
        How long another one takes after many restores, which may hit the
        moment when the guest has not read yet that the first was let go.
        """
        self.press(self.HOLD)
        end = time.monotonic() + self.HOLD * 2
        while time.monotonic() < end:
            for slot in slots:
                self.vm.cmd('x-snapshot-device-restore', slot=slot)
                time.sleep(0.005)
        start = time.monotonic()
        sent = len(self.console.read_bytes())
        self.press(0.02)
        self.wait_for(self.PRESSED, sent)
        return time.monotonic() - start

    def check(self, device):
        self.start(device)
        # Back by 3 s, and there again
        for _ in range(2):
            self.assertLess(self.hold(0), 3)
        # Forward by as much
        self.assertGreater(self.hold(1), self.HOLD * 0.8)
        self.assertLess(self.next_key(0, 1), 2)
        self.vm.cmd('x-snapshot-device-restore', slot=1)
        self.assertLess(self.next_key(0), 2)

    def test_dirty(self):
        self.check('snapshot,ram=dirty')

    def test_remap(self):
        self.check('snapshot,ram=remap')


if __name__ == '__main__':
    QemuSystemTest.main()

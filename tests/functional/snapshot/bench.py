#!/usr/bin/env python3
#
# How fast the snapshot device restores a bare-metal guest
#
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Prints a line for each machine, accelerator and number of pages written between
two restores: restores per second by the host's clock, and median and 99th
percentile of the device's own NANOSECONDS, which leave out the guest's work.
"""

import argparse
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from snapshot import build_guest


def run(args, image, machine, accel, pages, show):
    """The console's lines, each with when it was read"""
    guest = subprocess.Popen(
        [args.qemu, '-machine', machine, '-accel', accel, '-nodefaults',
         '-display', 'none', '-vga', 'none', '-m', args.memory,
         '-kernel', image, '-append',
         f'case=bench n={args.restores} pages={pages} print={show}',
         '-debugcon', 'stdio', '-device', args.device,
         '-device', 'isa-debug-exit,iobase=0xf4,iosize=4'],
        stdout=subprocess.PIPE, text=True)
    lines = [(time.monotonic(), line.split()) for line in guest.stdout]
    if guest.wait() != 33:
        sys.exit(f'{machine}, {accel}: ' + ' '.join(sum((w for _, w in lines),
                                                        [])))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--qemu', default=os.getenv('QEMU_TEST_QEMU_BINARY',
                                                    'qemu-system-x86_64'))
    parser.add_argument('--device', default='snapshot')
    parser.add_argument('--machines', default='pc,q35')
    parser.add_argument('--accels', default='tcg,kvm')
    parser.add_argument('--pages', default='1,10,100,1000')
    parser.add_argument('--memory', default='128M')
    parser.add_argument('--restores', type=int, default=2000)
    args = parser.parse_args()

    print(f'{args.memory}, {args.restores} restores, {args.device}\n'
          'machine accel pages restores/s median/us  p99/us')
    with tempfile.TemporaryDirectory() as directory:
        image = os.getenv('QEMU_TEST_SNAPSHOT_GUEST')
        if not image:
            image = os.path.join(directory, 'guest.elf')
            build_guest(image)
        for accel in args.accels.split(','):
            if accel == 'kvm' and not os.access('/dev/kvm', os.W_OK):
                print('(no /dev/kvm)')
                continue
            for machine in args.machines.split(','):
                for pages in args.pages.split(','):
                    when = {line[0]: t for t, line
                            in run(args, image, machine, accel, pages, 0)}
                    rate = args.restores / (when['END'] - when['START'])
                    ns = sorted(int(line[1], 16) for _, line
                                in run(args, image, machine, accel, pages, 1)
                                if line[0] == 'NS')
                    print(f'{machine:7} {accel:5} {pages:>5} {rate:10.0f} '
                          f'{ns[len(ns) // 2] / 1000:9.1f} '
                          f'{ns[len(ns) * 99 // 100] / 1000:7.1f}', flush=True)


if __name__ == '__main__':
    main()

# SPDX-License-Identifier: GPL-2.0-or-later
"""
soak.py QEMU BUILD [RESTORES] [QEMU ARGUMENT...]

Restore a Linux guest very often, and look at what QEMU holds all the while.
Run by scripts/soak. Fails if a restore was not exact, or if in the last tenth
memory, open files or the time of a restore are more than in the first one.
"""

import os
from pathlib import Path
import re
import sys
import time

from machine import BenchError, Machine
from stats import median

VERIFY = 1000           # every so manyth restore
SAMPLES = 200

# What the last tenth may have more than the first. Memory: heaps come to their
# size, and what RCU frees late comes and goes; a leak of 16 bytes a restore,
# the least that malloc() knows, is 16 MB in a million.
MEMORY_KIB = 8192
TIME_RATIO = 2          # a busy host


def memory_kib(pid):
    """QEMU's heap and stacks, and its private copies of pages"""
    text = Path(f'/proc/{pid}/smaps_rollup').read_text()
    return int(re.search(r'^Anonymous: +(\d+)', text, re.M).group(1))


def sample(machine):
    pid = machine.process.pid
    info = machine.qmp('x-query-snapshot-device')
    return {'restores': info['restores'], 'p99': info['p99-ns'] / 1000,
            'p50': info['p50-ns'] / 1000, 'memory': memory_kib(pid),
            'files': len(os.listdir(f'/proc/{pid}/fd')), 'info': info}


def soak(machine, restores):
    machine.wait_boot('bench: ready')
    machine.type('restore 10 1000')
    samples = []
    start = time.monotonic()
    machine.wait_dots(1)
    while True:
        s = sample(machine)
        if s['restores'] >= len(samples) * restores / SAMPLES:
            samples.append(s)
            spent = time.monotonic() - start
            left = spent * (restores / max(1, s['restores']) - 1)
            print(f'\r{s["restores"]:9} restores, {s["p50"]:.1f} us, '
                  f'{s["info"]["mismatched"]} of {s["info"]["verified"]} '
                  f'verified differ, {max(0, left):.0f} s left   ',
                  end='', file=sys.stderr, flush=True)
        if s['restores'] >= restores:
            print(file=sys.stderr)
            return samples, spent
        if machine.process.poll() is not None:
            machine.fail('QEMU ended')
        time.sleep(0.05)


def report(samples, seconds, out):
    """Prints the table; returns how many checks failed"""
    info = samples[-1]['info']
    tenth = max(1, len(samples) // 10)
    failed = 0

    def line(ok, text):
        nonlocal failed
        failed += not ok
        print('ok  ' if ok else 'FAIL', text, file=out)

    def ends(key):
        return (median([s[key] for s in samples[:tenth]]),
                median([s[key] for s in samples[-tenth:]]))

    print(f'{info["restores"]} restores of a Linux guest in {seconds:.0f} s, '
          f'{info["restores"] / seconds:.0f} a second, ram={info["ram"]}; '
          'medians over the first and the last tenth:', file=out)
    first, last = ends('memory')
    line(last - first < MEMORY_KIB, f'memory       {first} KiB, {last} KiB')
    first, last = ends('files')
    line(first == last, f'open files   {first}, {last}')
    first, last = ends('p99')
    line(last < TIME_RATIO * first, f'p99          {first:.1f} us, '
                                    f'{last:.1f} us')
    line(info['verified'] and not info['mismatched'],
         f'verified     {info["verified"]} restores; '
         f'{info["mismatched"]} were not exact')
    if info['mismatched']:
        print(f'the first: {info["mismatches"]}', file=out)
    return failed


def main(qemu, build, restores='1000000', *args):
    linux = Path(build, 'linux')
    directory = Path(build, 'soak')
    args = ['-machine', 'q35', '-accel', 'tcg', '-nodefaults',
            '-display', 'none', '-m', '256M',
            '-kernel', linux / 'vmlinuz', '-initrd', linux / 'initramfs',
            '-serial', 'chardev:console', '-no-reboot', '-append',
            'console=ttyS0 quiet panic=-1 snapshot.run=bench',
            '-device', f'snapshot,verify={VERIFY}', *args]
    try:
        with Machine(qemu, list(map(str, args)), directory) as machine:
            samples, seconds = soak(machine, int(restores))
    except BenchError as err:
        sys.exit(f'soak: {err}')
    with (directory / 'report.txt').open('w', encoding='utf-8') as out:
        failed = report(samples, seconds, out)
    print((directory / 'report.txt').read_text(encoding='utf-8'), end='')
    sys.exit(failed != 0)


if __name__ == '__main__':
    main(*sys.argv[1:])

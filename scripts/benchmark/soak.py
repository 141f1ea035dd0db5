# SPDX-License-Identifier: GPL-2.0-or-later
"""
soak.py QEMU BUILD [--disk] [RESTORES] [QEMU ARGUMENT...]

Restore a Linux guest very often, and look at what QEMU holds all the while.
Run by scripts/soak. Fails if a restore was not exact, or if in the last tenth
memory, open files or the time of a restore are more than in the first one. With
--disk, the guest writes to its disk between restores; then it also fails if more
is kept for the disk in the end, or if anything reached the image.
"""

import hashlib
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
DISK = 16 << 20


def memory_kib(pid):
    """QEMU's heap and stacks, and its private copies of pages"""
    text = Path(f'/proc/{pid}/smaps_rollup').read_text()
    return int(re.search(r'^Anonymous: +(\d+)', text, re.M).group(1))


def digest(path):
    return hashlib.sha256(path.read_bytes()).digest()


def sample(machine):
    pid = machine.process.pid
    info = machine.qmp('x-query-snapshot-device')
    return {'disk': sum(d['memory-bytes'] + d['spilled-bytes']
                        for d in info.get('disks', [])),
            'restores': info['restores'], 'p99': info['p99-ns'] / 1000,
            'p50': info['p50-ns'] / 1000, 'memory': memory_kib(pid),
            'files': len(os.listdir(f'/proc/{pid}/fd')), 'info': info}


def soak(machine, restores, disk):
    """Samples; the seconds; is the image as at the save, None if no @disk"""
    machine.wait_boot('bench: ready')
    machine.type('restore 10 1000' + (' write /dev/vda' if disk else ''))
    samples = []
    start = time.monotonic()
    machine.wait_dots(1)
    saved = disk and digest(disk)
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
            return samples, spent, disk and digest(disk) == saved
        if machine.process.poll() is not None:
            machine.fail('QEMU ended')
        time.sleep(0.05)


def report(samples, seconds, image, out):
    """
    Prints the table, with the disk if @image tells whether its file is as it
    was; returns how many checks failed
    """
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
    if image is not None:
        first, last = (max(s['disk'] for s in part) for part in
                       (samples[:tenth], samples[-tenth:]))
        line(0 < first == last, f'disk         {first} bytes, {last} bytes')
        line(image, f'image        {"as it was" if image else "written to"}')
    # Whatever else a busy host does is in the p99, but not in the median.
    first, last = ends('p50')
    p99s = ends('p99')
    line(last < TIME_RATIO * first,
         f'a restore    {first:.1f} us, {last:.1f} us; '
         f'p99 {p99s[0]:.1f} us, {p99s[1]:.1f} us')
    line(info['verified'] and not info['mismatched'],
         f'verified     {info["verified"]} restores; '
         f'{info["mismatched"]} were not exact')
    if info['mismatched']:
        print(f'the first: {info["mismatches"]}', file=out)
    return failed


def main(qemu, build, *args):
    linux = Path(build, 'linux')
    directory = Path(build, 'soak')
    disk = None
    if args[:1] == ('--disk',):
        args = args[1:]
        linux /= 'drivers'
        disk = directory / 'disk'
        disk.write_bytes(os.urandom(DISK))
    restores, *args = args or ('1000000',)
    modules = 'snapshot.modules=virtio_pci,virtio_blk ' if disk else ''
    args = ['-machine', 'q35', '-accel', 'tcg', '-display', 'none',
            '-m', '256M',
            '-kernel', linux / 'vmlinuz', '-initrd', linux / 'initramfs',
            '-serial', 'chardev:console', '-no-reboot', '-append',
            f'console=ttyS0 quiet panic=-1 {modules}snapshot.run=bench',
            '-device', f'snapshot,verify={VERIFY}', *args]
    if disk:
        args += ['-drive', f'if=virtio,format=raw,file={disk}']
    try:
        with Machine(qemu, list(map(str, args)), directory) as machine:
            samples, seconds, image = soak(machine, int(restores), disk)
    except BenchError as err:
        sys.exit(f'soak: {err}')
    with (directory / 'report.txt').open('w', encoding='utf-8') as out:
        failed = report(samples, seconds, image, out)
    print((directory / 'report.txt').read_text(encoding='utf-8'), end='')
    sys.exit(failed != 0)


if __name__ == '__main__':
    main(*sys.argv[1:])

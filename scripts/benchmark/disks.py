# SPDX-License-Identifier: GPL-2.0-or-later
"""
What disks cost that go back: the time of a restore, by what was written; and
what a guest's requests lose by the overlay that they go through.
"""

import contextlib
import re
import tempfile
import time

from machine import Machine
import stats

DISK = 'vda'
# Of vm-snapshot.c
RESTORE = re.compile(r'^vm_snapshot_disks_restore (\d+) clusters, (\d+) ns$',
                     re.M)
# us that a restore may take, and what more each cluster may
GOAL_FIXED, GOAL_CLUSTER = 2, 0.06
# The least part of the image's own throughput
GOAL_THROUGHPUT = 0.9

# What fio is told, and which of its two figures is looked at
PATTERNS = {'random reads of 4k': ('randread 4k', 1),
            'random writes of 4k': ('randwrite 4k', 1),
            'reads of 1M in a row': ('read 1M', 0),
            'writes of 1M in a row': ('write 1M', 0)}
# QEMU's ways to have a disk, the first is what others are compared with
WAYS = {'image': ('', 'disks=keep'),
        'overlay': ('', 'disks=restore'),
        'qcow2, snapshot=on': (',snapshot=on', 'disks=keep')}
SIZE = 256 << 20


def goal(clusters):
    return GOAL_FIXED + clusters * GOAL_CLUSTER


def disks(bench, clusters):
    """
    A list of one record, of restores with so many @clusters written to. The
    host writes and restores, for the time of the disk alone is asked, which the
    trace has.
    """
    args = ['-machine', 'q35', '-accel', 'tcg', '-nodefaults', '-display',
            'none', '-m', '32M', '-S', '-blockdev',
            f'null-co,node-name={DISK},size={1 << 30},read-zeroes=on',
            '-device', f'ide-hd,drive={DISK},id={DISK}',
            '-device', 'snapshot', '-trace', 'vm_snapshot_disks_restore']
    end = time.monotonic() + 2 * bench.effort.seconds
    with Machine(bench.qemu, args,
                 tempfile.mkdtemp(dir=bench.directory)) as m:
        m.qmp('x-snapshot-device-save', slot=0)
        for i in range(bench.effort.restores + 1):
            if clusters:
                m.hmp(f'qemu-io -d {DISK} "write -P {i % 255 + 1} 0 '
                      f'{4 * clusters}k"')
            m.qmp('x-snapshot-device-restore', slot=0)
            if i and time.monotonic() > end:
                break
        found = RESTORE.findall(m.trace_log.read_text())
        # The first one finds memory that was never touched.
        times = [int(ns) for n, ns in found[1:] if int(n) == clusters]
        if len(times) != len(found) - 1 or not times:
            m.fail(f'{clusters} clusters were written, and these put back: '
                   f'{found[:9]}')
    return [{'what': 'disks', 'clusters': clusters, 'n': len(times),
             'us': stats.distribution(times)}]


def _machine(bench, way):
    drive, options = WAYS[way]
    directory = tempfile.mkdtemp(dir=bench.directory)
    path = f'{directory}/disk'
    with open(path, 'wb') as f:
        for i in range(SIZE >> 20):
            f.write(bytes([i % 255 + 1]) * (1 << 20))
    linux = bench.linux
    return Machine(bench.qemu, [
        '-machine', 'q35', '-accel', 'tcg', '-nodefaults', '-display', 'none',
        '-m', '512M', '-rtc', 'clock=vm', '-serial', 'chardev:console',
        '-kernel', f'{linux}/drivers/vmlinuz',
        '-initrd', f'{linux}/disks/initramfs', '-append',
        'console=ttyS0 quiet panic=-1 snapshot.modules=virtio_pci,virtio_blk '
        'snapshot.run=throughput',
        '-drive', f'if=virtio,format=raw,file={path}{drive}',
        '-device', f'snapshot,{options}'], directory)


def throughput(bench):
    """
    A list of records, one for each pattern and way. The machines take turns,
    those that wait for theirs do nothing.
    """
    results = {}
    with contextlib.ExitStack() as stack:
        machines = {way: stack.enter_context(_machine(bench, way))
                    for way in WAYS}
        for m in machines.values():
            m.wait_boot('throughput: ready')
            m.qmp('x-snapshot-device-save', slot=0)
        for _ in range(bench.effort.fio):
            for pattern, (words, which) in PATTERNS.items():
                for way, m in machines.items():
                    found = _fio(m, words, bench.effort.fio_seconds)
                    results.setdefault((pattern, way), []).append(found[which])
    return [{'what': 'throughput', 'pattern': pattern, 'way': way,
             'unit': 'MiB/s' if PATTERNS[pattern][1] == 0 else '/s',
             'rate': stats.median(rates) / (1 if PATTERNS[pattern][1] else
                                            1024),
             'ratio': stats.median([a / b for a, b in zip(
                 rates, results[pattern, next(iter(WAYS))])])}
            for (pattern, way), rates in results.items()]


def _fio(m, words, seconds):
    """(KiB a second, requests a second)"""
    result = re.compile(r'throughput: (\d+) (\d+)\r?\n')
    count = len(result.findall(m.console_text))
    m.type(f'{words} {seconds}')
    end = time.monotonic() + 60 + 20 * seconds
    while len(found := result.findall(m.console_text)) == count:
        if m.process.poll() is not None or 'exited with' in m.console_text:
            m.fail('the guest ended')
        if time.monotonic() > end:
            m.fail(f'fio did not end: {words}')
        time.sleep(0.02)
    return tuple(map(int, found[-1]))

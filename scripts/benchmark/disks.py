# SPDX-License-Identifier: GPL-2.0-or-later
"""
How long it takes to put a disk back, by what was written to it. The host writes
and restores, for the time of the disk alone is asked, which the trace has.
"""

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


def goal(clusters):
    return GOAL_FIXED + clusters * GOAL_CLUSTER


def disks(bench, clusters):
    """A list of one record, of restores with so many @clusters written to"""
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

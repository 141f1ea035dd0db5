# SPDX-License-Identifier: GPL-2.0-or-later
"""
What disks cost that go back: the time of a restore, by what was written, after
requests in flight, and beside QEMU's other ways to go back; and what a guest's
requests lose by the overlay that they go through.
"""

import contextlib
from pathlib import Path
import re
import subprocess
import tempfile
import time

from machine import BenchError, Machine
from measure import qemu_img
import stats

DISK = 'vda'
# Of vm-snapshot.c
RESTORE = re.compile(r'^vm_snapshot_disks_restore (\d+) clusters, (\d+) ns$',
                     re.M)
# us that a restore may take, and what more each cluster may
GOAL_FIXED, GOAL_CLUSTER = 2, 0.06
# Reads that a restore waits for, how long each takes at least, and what may come
# after
REQUESTS, LATENCY_US = 32, 20000
IN_FLIGHT = 1000        # restores, for a p99
IN_FLIGHT_WAYS = 'a restore', 'stop, then load and start'
GOAL_AFTER = 100
# Clusters that are written to compare ways back, and what each puts back
BACK = 1000
WAYS_BACK = {'restore': 'the machine', 'loadvm': 'the machine',
             'blockdev-snapshot': 'the disk alone'}
# Of "-msg timestamp=on", in microseconds, and the phases in nanoseconds
TIMED = re.compile(r'^\d+@(\d+)\.(\d{6}):(blk_co_preadv|vm_stop_flush_all|'
                   r'vm_snapshot_restore) (?:slot 0: wake (\d+) ns, '
                   r'stop (\d+) ns, load (\d+) ns, start (\d+) ns)?', re.M)
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
NULL = f'null-co,size={1 << 30},read-zeroes=on'


def goal(clusters):
    return GOAL_FIXED + clusters * GOAL_CLUSTER


def disks(bench, clusters):
    """
    A list of one record, of restores with so many @clusters written to. The
    host writes and restores, for the time of the disk alone is asked, which the
    trace has.
    """
    args = [*_args(NULL), '-device', 'snapshot', '-trace',
            'vm_snapshot_disks_restore']
    end = time.monotonic() + 2 * bench.effort.seconds
    with Machine(bench.qemu, args,
                 tempfile.mkdtemp(dir=bench.directory)) as m:
        m.qmp('x-snapshot-device-save', slot=0)
        for i in range(bench.effort.restores + 1):
            if clusters:
                _write(m, clusters, i)
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


def _args(disk):
    return ['-machine', 'q35', '-accel', 'tcg', '-nodefaults', '-display',
            'none', '-m', '32M', '-S', '-blockdev', f'{disk},node-name={DISK}',
            '-device', f'ide-hd,drive={DISK},id={DISK}']


def _write(m, clusters, i):
    m.hmp(f'qemu-io -d {DISK} "write -P {i % 255 + 1} 0 {4 * clusters}k"')


def in_flight(bench):
    """
    A list of two records, of the time from when the last of the requests in
    flight is done, at the earliest: to the end of a restore; and to the end of
    QEMU's own "stop", which waits for them as well, and flushes, and to load
    and start in a restore without any after as long a pause, as caches are cold.
    """
    latency_us = max(LATENCY_US, 3 * _ask_us(bench))
    args = [*_args(f'{NULL},latency-ns={1000 * latency_us}'), '-msg',
            'timestamp=on', '-device', 'snapshot', '-trace', 'blk_co_preadv',
            '-trace', 'vm_stop_flush_all', '-trace', 'vm_snapshot_restore']
    end = time.monotonic() + 12 * bench.effort.seconds
    count = 0
    with Machine(bench.qemu, args,
                 tempfile.mkdtemp(dir=bench.directory)) as m:
        m.qmp('x-snapshot-device-save', slot=0)
        while not count or (count < IN_FLIGHT and time.monotonic() < end):
            _ask(m)
            m.qmp('x-snapshot-device-restore', slot=0)
            _ask(m)
            m.qmp('stop')
            time.sleep(latency_us / 1e6)
            m.qmp('x-snapshot-device-restore', slot=0)
            count += 1
        after, apart = _after_reads(m, m.trace_log.read_text(), latency_us)
    if not after or not apart:
        raise BenchError('the host was too slow to have reads in flight')
    return [{'what': 'in_flight', 'way': way, 'n': len(times),
             'us': stats.distribution(times)}
            for way, times in zip(IN_FLIGHT_WAYS, (after, apart))]


def _ask(m):
    m.hmp(*(f'qemu-io -d {DISK} "aio_read -q {i}M 4k"'
            for i in range(REQUESTS)))


def _ask_us(bench):
    """How long it takes to ask for the reads: on some hosts, 1 ms for each"""
    with Machine(bench.qemu, _args(NULL),
                 tempfile.mkdtemp(dir=bench.directory)) as m:
        start = time.monotonic()
        _ask(m)
        return round(1e6 * (time.monotonic() - start))


def _after_reads(m, trace, latency_us):
    """
    Nanoseconds of restores with reads in flight; and of a stop with them and
    what comes after that in a restore
    """
    after, apart, reads, stop = [], [], [], None
    for seconds, us, event, *phases in TIMED.findall(trace):
        at = 1000000 * int(seconds) + int(us)
        if event == 'blk_co_preadv':
            reads.append(at)
            continue
        left = None
        if reads:
            # Before the first, the disk was probed.
            reads = reads[-REQUESTS:]
            left = at - reads[-1] - latency_us
            if len(reads) != REQUESTS or left < 0:
                m.fail(f'{len(reads)} reads, and {event} {left} us after the '
                       'last was done')
            # On a busy host, the first may be done before the last begins.
            if reads[-1] - reads[0] >= latency_us:
                left = None
        if event == 'vm_stop_flush_all':
            stop = left
        elif not reads:
            if stop is not None:
                # Its wait for requests, of which there are none, is not added.
                apart.append(1000 * stop + sum(map(int, phases[2:])))
        elif left is not None:
            after.append(1000 * left)
        reads = []
    return after, apart


def _qemu_img(bench, *args):
    subprocess.run([qemu_img(bench.qemu), *args], check=True,
                   stdout=subprocess.DEVNULL)


class _Restore:
    """By the snapshot device"""
    args = '-device', 'snapshot'

    def __init__(self, m, _bench, _image):
        self.m = m
        m.qmp('x-snapshot-device-save', slot=0)

    def back(self):
        self.m.qmp('x-snapshot-device-restore', slot=0)


class _Loadvm:
    """RAM and devices, too, in the image"""
    args = ()

    def __init__(self, m, _bench, _image):
        self.m = m
        m.hmp('savevm one')

    def back(self):
        self.m.hmp('loadvm one')


class _Fresh:
    """A new file over the image each time, RAM and devices stay as they are"""
    args = ()

    def __init__(self, m, bench, image):
        self.m = m
        self.path = f'{image}.over'
        _qemu_img(bench, 'create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b',
                  image, self.path)
        self.empty = Path(self.path).read_bytes()
        self.count = 0
        self._add(None)
        m.qmp('blockdev-snapshot', node=DISK, overlay='over0')

    def _add(self, backing):
        path = f'{self.path}{self.count}'
        Path(path).write_bytes(self.empty)
        self.m.qmp('blockdev-add', driver='qcow2',
                   node_name=f'over{self.count}', file={
                       'driver': 'file', 'filename': path}, backing=backing)

    def back(self):
        old = self.count
        self.count += 1
        self._add(DISK)
        self.m.qmp('qom-set', path=f'/machine/peripheral/{DISK}',
                   property='drive', value=f'over{self.count}')
        self.m.qmp('blockdev-del', node_name=f'over{old}')
        Path(f'{self.path}{old}').unlink()


def ways_back(bench):
    """
    Records, one for each way to go back, as the host sees it by QMP, after as
    many clusters of an image of qcow2 were written
    """
    results = []
    for way, kind in zip(WAYS_BACK, (_Restore, _Loadvm, _Fresh)):
        image = f'{tempfile.mkdtemp(dir=bench.directory)}/disk'
        _qemu_img(bench, 'create', '-q', '-f', 'qcow2', image, str(SIZE))
        times = []
        with Machine(bench.qemu, [
                *_args(f'qcow2,file.driver=file,file.filename={image}'),
                *kind.args], tempfile.mkdtemp(dir=bench.directory)) as m:
            it = kind(m, bench, image)
            end = time.monotonic() + bench.effort.stock_seconds
            for i in range(bench.effort.stock + 1):
                _write(m, BACK, i)
                start = time.monotonic_ns()
                it.back()
                times.append(time.monotonic_ns() - start)
                if i and time.monotonic() > end:
                    break
        us = stats.distribution(times[1:])
        results.append({
            'what': 'back', 'way': way, 'n': len(times) - 1, 'us': us,
            'ratio': us['median'] / (results[0] if results else
                                     {'us': us})['us']['median']})
    return results


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

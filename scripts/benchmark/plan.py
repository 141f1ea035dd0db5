# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run measures, in which order, and about how long that takes"""

import collections
from pathlib import Path

from calls import calls
import devices
import files
from disks import disks, in_flight, PATTERNS, throughput, ways_back, WAYS
import loop
from measure import Effort, Setup, kvm_missing
import shapes
from turns import Track

# seconds: an estimate, with Linux booting in 6
Step = collections.namedtuple('Step', 'title seconds run')

EFFORTS = {
    'quick': Effort(restores=1000, seconds=1.5, rate_seconds=0.5, stock=30,
                    stock_seconds=4, floor_seconds=0.8, turns=8,
                    turn_seconds=0.2, calls_seconds=1.5, fio=3,
                    fio_seconds=1, loop=3, loop_seconds=0.7, saves=2,
                    save_mib=1024, starts=7, workers=8),
    'full': Effort(restores=1000, seconds=12, rate_seconds=2, stock=100,
                   stock_seconds=15, floor_seconds=3, turns=20,
                   turn_seconds=0.25, calls_seconds=3, fio=10, fio_seconds=1,
                   loop=5, loop_seconds=1.5, saves=3,
                   save_mib=4096, starts=25, workers=100),
    'self-test': Effort(restores=20, seconds=0.3, rate_seconds=0.1, stock=3,
                        stock_seconds=0, floor_seconds=0.1, turns=3,
                        turn_seconds=0.05, calls_seconds=0.3, fio=1,
                        fio_seconds=1, loop=1, loop_seconds=0.2, saves=1,
                        save_mib=64, starts=1, workers=2),
}

CLUSTERS = 0, 10, 1000, 10000
QUICK_PAGES = 0, 1, 10, 100, 1000
PAGES = 0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000
RAM = 64, 128, 256, 512, 1024, 2048, 4096, 8192
SMP = 1, 2, 4, 8

# With pages that vCPUs wrote to in a bitmap, or in a list
KVM = 'kvm'
KVM_RING = 'kvm,dirty-ring-size=4096'

# Compared with each other, so measured one right after the other
BARE = Setup('bare', 'pc', 128)
LARGE = Setup('bare', 'pc', 8192)
LINUX = Setup('linux', 'q35', 256)


class Plan:
    """
    The steps of a run; @skipped says what is left out, and why. No two of the
    same thing: what several sweeps share is measured once.
    """

    def __init__(self, bench, mode, cache, only=None):
        self.bench = bench
        self.cache = cache      # of what the devices need
        self.only = only        # what titles have, or None for all
        self.track = Track(bench)
        self.steps = []
        self.skipped = []
        self.planned = set()
        self.effort = EFFORTS[mode]
        {'quick': self.quick, 'full': self.full,
         'self-test': self.self_test}[mode]()

    def new(self, *what):
        """Is this planned for the first time?"""
        if what in self.planned:
            return False
        self.planned.add(what)
        return True

    def wanted(self, title):
        return not self.only or any(text in title for text in self.only)

    def add(self, title, seconds, run, *args):
        if self.wanted(title):
            self.steps.append(Step(title, seconds, lambda: run(*args)))

    def restores(self, setup, engine, *pages):
        pages = tuple(n for n in pages if self.new(setup, engine, n))
        if not pages:
            return
        boot = 0.7 if setup.guest == 'bare' else 5 + setup.smp
        # An estimate, with what a guest does after a restore by remap
        one = 0.0004 if engine == 'dirty' else \
            0.003 if setup.guest == 'bare' else 0.02
        each = 0.2 + self.effort.rate_seconds + min(
            2 * self.effort.seconds, self.effort.restores * one * 1.5)
        if setup.guest == 'linux':
            self.add(f'{setup}, ram={engine}', boot + each * len(pages),
                     self.bench.restores, setup, engine, pages)
            return
        for n in pages:
            self.add(f'{setup}, ram={engine}, {n} pages', boot + each,
                     self.bench.restores, setup, engine, (n,))

    def floors(self, *pages):
        for n in pages:
            self.add(f'memcpy, {n} pages', 0.5,
                     self.bench.floor, 'memcpy', BARE.ram, (n,))
            self.add(f'fork, {n} pages', 0.3 + self.effort.floor_seconds,
                     self.bench.floor, 'fork', BARE.ram, (n,))

    def stock(self, setup, pages):
        self.add(f'{setup}, loadvm and snapshot-load, {pages} pages',
                 8 + 2.2 * self.effort.stock_seconds,
                 self.bench.stock, setup, pages)
        self.add(f'{setup}, a new process with -incoming file:, {pages} pages',
                 8 + 1.2 * self.effort.stock_seconds,
                 self.bench.incoming, setup, pages)

    def pages_sweep(self, pages):
        for n in pages:
            # Neighbours, as their ratios are goals, and hosts have moods
            self.restores(BARE, 'dirty', n)
            self.floors(n)
            if n == 10:
                self.restores(LARGE, 'dirty', n)
            self.restores(BARE, 'remap', n)

    def kvm(self, pages):
        reason = kvm_missing()
        if reason:
            self.skipped.append(('KVM', reason))
            return
        for machine in 'pc', 'q35':
            for n in pages:
                for accel, engine in ((KVM, 'dirty'), (KVM_RING, 'dirty'),
                                      (KVM, 'remap')):
                    self.restores(Setup('bare', machine, 128, accel), engine,
                                  n)
        for accel in KVM, KVM_RING:
            self.restores(Setup('bare', 'pc', 8192, accel), 'dirty', 10)
        if Path('/sys/module/kvm_pvm').exists():
            self.skipped.append(('Linux with KVM', 'kvm_pvm emulates it, and '
                                 'does not know all instructions'))
            return
        for engine in 'dirty', 'remap':
            self.restores(Setup('linux', 'q35', 256, KVM), engine, 10)

    def goals(self):
        """What the table of goals needs, but for the sweep of pages on pc"""
        for n in 1, 10, 100, 1000:
            self.restores(Setup('bare', 'q35', 128), 'dirty', n)
            if n == 10:
                self.restores(Setup('bare', 'q35', 128), 'remap', n)
        self.restores(LINUX, 'dirty', 10)
        self.restores(LINUX, 'remap', 10)
        self.stock(LINUX, 10)
        self.restores(Setup('linux', 'q35', 1024), 'dirty', 10)
        self.restores(Setup('linux', 'q35', 256, virtio=True), 'dirty', 10)
        for smp in 2, 4:
            self.restores(Setup('linux', 'q35', 256, smp=smp), 'dirty', 10)

    def machines(self, *groups):
        for base, *others in groups:
            for shape in others:
                seconds = 3 * self.effort.turns * self.effort.turn_seconds + (
                    2 if shape.guest == 'bare' else
                    25 if shape.drivers else 8 + shape.smp)
                self.add(f'{shape}, against {base}', seconds,
                         self.track.machine, shape, base)

    def calls(self, *wanted):
        for shape in wanted:
            for before in (False, True) if self.bench.before else (False,):
                self.add(f'system calls, {shape}' + ', before' * before,
                         2 + self.effort.calls_seconds +
                         6 * (shape.guest == 'linux'),
                         calls, self.bench, shape, before)

    def disks(self, *clusters):
        for n in clusters:
            self.add(f'a disk, {n} clusters', 1 + min(
                2 * self.effort.seconds,
                self.effort.restores * (0.001 + n * 2e-6)),
                     disks, self.bench, n)
        self.add('a disk, requests in flight',
                 2 + min(12 * self.effort.seconds, 130), in_flight, self.bench)
        self.add('a disk, ways back', 3 * (1 + self.effort.stock_seconds),
                 ways_back, self.bench)
        self.add('a disk, throughput', 15 + self.effort.fio *
                 (self.effort.fio_seconds + 1.2) * len(PATTERNS) * len(WAYS),
                 throughput, self.bench)

    def loop(self):
        each = self.effort.loop * self.effort.loop_seconds
        self.add('the fuzzing loop, toy', 5 + 11 * each + 6 * self.effort.loop,
                 loop.toy, self.bench)
        for name in loop.COUNTS, loop.COUNTED:
            self.add(f'the fuzzing loop, {name}',
                     25 + 11 * each + 6 * self.effort.loop, loop.xmllint,
                     self.bench, name)
        self.add('the fuzzing loop, kernel demo', 15 + each, loop.demo,
                 self.bench)

    def files(self, *mib):
        for percent in files.USED:
            self.add(f'files: save, {percent} % of RAM used',
                     2 + self.effort.saves * self.effort.save_mib / 5000 *
                     (10 + percent), files.save, self.bench, percent)
        for ram in mib:
            self.add(f'files: start, {ram} MiB', 2 + ram / 500 +
                     self.effort.starts * (1 + ram / 4000), files.starts,
                     self.bench, ram)
        self.add('files: workers', 5 + self.effort.workers / 5 +
                 2 * self.effort.turns * self.effort.turn_seconds,
                 files.workers, self.bench)

    def devices(self, wanted=None):
        qemu = self.bench.qemu
        reason = devices.missing(qemu)
        if reason:
            self.skipped.append(('each device', reason))
            return
        if self.only and not any('device' in text for text in self.only):
            return              # it takes long to find them
        categories = devices.categories(qemu)
        for shape, base in devices.shapes(qemu, self.cache, wanted):
            self.add(f'device {shape}', 2, self.track.device, shape, base,
                     categories.get(shape.name))

    def busy(self, tasks):
        for i, (name, task) in enumerate(tasks.items()):
            self.add(f'busy: {name}', (4 if i else 50) +
                     3 * self.effort.turns * self.effort.turn_seconds,
                     self.track.busy, shapes.BUSY, name, task)

    def quick(self):
        self.pages_sweep(QUICK_PAGES)
        self.goals()
        self.kvm((10,))
        self.machines(*shapes.GROUPS)
        self.calls(*shapes.CALLS)
        self.disks(*CLUSTERS)
        self.loop()
        self.files(256, 1024)
        self.skipped.append(('sweeps of RAM and vCPUs', 'a quick run'))
        for what in 'each device', 'busy devices':
            self.skipped.append((what, 'a quick run'))

    def full(self):
        self.pages_sweep(PAGES)
        for ram in RAM:
            for engine in 'dirty', 'remap':
                self.restores(Setup('bare', 'pc', ram), engine, 10)
        self.restores(LINUX, 'dirty', *PAGES)
        # By remap, Linux takes 20 ms
        self.restores(LINUX, 'remap', 1, 10, 100, 1000, 10000)
        self.goals()
        self.stock(Setup('linux', 'q35', 1024), 10)
        for engine in 'dirty', 'remap':
            for n in 1, 100, 1000:
                self.restores(Setup('bare', 'q35', 128), engine, n)
            for smp in SMP:
                self.restores(Setup('linux', 'q35', 256, smp=smp), engine, 10)
            for machine in 'pc', 'q35':
                for virtio in False, True:
                    self.restores(Setup('linux', machine, 256, virtio=virtio),
                                  engine, 10)
        self.kvm((1, 10, 100, 1000))
        self.machines(*shapes.GROUPS)
        self.calls(*shapes.CALLS)
        self.disks(*CLUSTERS)
        self.loop()
        self.files(256, 1024, 8192)
        self.busy(shapes.TASKS)
        self.devices()

    def self_test(self):
        """That each kind of measurement works, not more"""
        for engine in 'dirty', 'remap':
            self.restores(BARE, engine, 1, 10)
        self.floors(1, 10, 1000)
        self.restores(LINUX, 'dirty', 1, 10)
        self.stock(LINUX, 10)
        # The firmware does not load the bare guest.
        self.machines(*(group if group is shapes.UEFI else shapes.bare(group)
                        for group in shapes.GROUPS))
        self.calls(*shapes.bare(shapes.CALLS))
        self.disks(10, 1000, 10000)
        self.loop()
        self.files(256)
        name, task = next(iter(shapes.TASKS.items()))
        self.busy({name: task})
        self.devices(shapes.SELF_TEST_DEVICES)
        self.skipped.append(('most of it', 'a self-test'))

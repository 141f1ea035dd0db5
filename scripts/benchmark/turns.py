# SPDX-License-Identifier: GPL-2.0-or-later
"""
Two machines that take turns: both restore without end, but only one runs at a
time, the other is stopped by SIGSTOP. What the host does besides falls on both
alike, and what is told of one against the other is a median over the rounds.
"""

import contextlib
import os
from pathlib import Path
import signal
import tempfile
import time

from machine import Machine
from shapes import missing
import stats

# What a guest never comes to: a dot each so many restores
NEVER = 1000000000
# Restores of which QEMU tells percentiles
WINDOW = 1024
# The slot that the host keeps for itself
HOSTS = 1


class Racer:
    """A machine that restores without end in its turns"""

    def __init__(self, bench, shape, task=None):
        self.shape = shape
        self.task = task
        self.machine = machine_of(bench, shape)
        self.per_second = 10000         # a first guess
        self.turns = []

    def __enter__(self):
        self.machine.__enter__()
        try:
            self.pid = self.machine.process.pid
            if self.shape.guest == 'linux':
                self.machine.wait_boot('bench: ready')
                time.sleep(0.2)     # for the guest to have come to its read()
                if self.task is not None:
                    self.machine.qmp('x-snapshot-device-save', slot=HOSTS)
                self._begin(self.task or '')
            # It says that it saved
            self.machine.wait_dots(1)
            self.wait()
        except BaseException:
            self.machine.__exit__()
            raise
        return self

    def __exit__(self, *exc_info):
        self.machine.__exit__()

    def _begin(self, task):
        self.machine.type(f'restore {self.shape.pages} {NEVER} {task}')

    def again(self, task):
        """From the reading of the line, to which a @task led at first"""
        self.go_on()
        self.machine.qmp('x-snapshot-device-restore', slot=HOSTS)
        self._begin(task)
        self.machine.wait_dots(self.machine.dots[-1][1] + 1)
        self.wait()
        self.turns = []

    def _ask(self):
        return self.machine.qmp('x-query-snapshot-device')

    def restores(self):
        """Since the machine was started; it has to run."""
        return self._ask()['restores']

    def _threads(self):
        """By thread, the seconds that it ran, and waited for a processor"""
        found = {}
        for task in Path(f'/proc/{self.pid}/task').iterdir():
            with contextlib.suppress(FileNotFoundError):
                ran, waited, _ = (task / 'schedstat').read_text().split()
                found[task.name] = int(ran) / 1e9, int(waited) / 1e9
        return found

    def _state(self):
        return self._ask(), time.monotonic(), self._threads()

    def go_on(self):
        os.kill(self.pid, signal.SIGCONT)

    def wait(self):
        os.kill(self.pid, signal.SIGSTOP)

    def run(self, restores, seconds):
        """
        Look on until there were so many @restores, or for so long, but until
        there was one: what there was then
        """
        info, start, before = self._state()
        while True:
            # Each question disturbs: rather wait than ask
            time.sleep(max(0.002, min(restores / self.per_second, seconds)))
            last, end, after = self._state()
            n = last['restores'] - info['restores']
            if n and (n >= restores or end - start >= seconds):
                break
            if end - start > 60:
                self.machine.fail('the guest does not restore')
        self.per_second = n / (end - start)
        ran, waited = zip(*([now - was for now, was in
                             zip(times, before.get(thread, (0, 0)))]
                            for thread, times in after.items()))
        # What the host did besides is not the machine's: without the time for
        # which a thread could not run though it wanted to. Where one waits for
        # another, these do not overlap; if they do, it takes no less than the
        # thread that ran longest.
        took = max(end - start - sum(waited), max(ran))
        return {
            'n': n,
            'restores': last['restores'],
            'per_second': self.per_second,
            'own_rate': n / took,
            'cpu_us': sum(ran) / n * 1e6,
            'p50': last['p50-ns'] / 1000,
            'p99': last['p99-ns'] / 1000,
            'resets': [last.get(kind, 0) - info.get(kind, 0)
                       for kind in ('device-resets', 'machine-resets')],
            'reason': last.get('reset-reason'),
        }

    def turn(self, restores, seconds):
        self.go_on()
        try:
            return self.run(restores, seconds)
        finally:
            self.wait()

    def take_turn(self, restores, seconds):
        self.turns.append(self.turn(restores, seconds))

    def median(self, key):
        return stats.median([t[key] for t in self.turns])

    def against(self, other, key, compare):
        """The median over the rounds, of what the two had in the same one"""
        return stats.median([compare(mine[key], theirs[key]) for mine, theirs
                             in zip(self.turns, other.turns)])

    def way(self):
        """How most restores put back what is not in place, and why"""
        n = sum(t['n'] for t in self.turns)
        devices, machine = (sum(t['resets'][i] for t in self.turns)
                            for i in (0, 1))
        if 2 * machine > n:
            return 'machine reset', self.turns[-1]['reason']
        if 2 * devices > n:
            return 'device reset', self.turns[-1]['reason']
        return 'in place', None


def divide(a, b):
    return a / b


def subtract(a, b):
    return a - b


def result(racer, base):
    """What @racer is to @base, after the same rounds"""
    way, reason = racer.way()
    return {
        'name': racer.shape.name, 'against': base.shape.name,
        'guest': racer.shape.guest, 'smp': racer.shape.smp,
        'n': sum(t['n'] for t in racer.turns), 'rounds': len(racer.turns),
        'per_second': racer.median('own_rate'),
        'rate_ratio': racer.against(base, 'own_rate', divide),
        'wall_ratio': racer.against(base, 'per_second', divide),
        'cpu_us': racer.median('cpu_us'),
        'cpu_ratio': racer.against(base, 'cpu_us', divide),
        'us': racer.median('p50'), 'p99_us': racer.median('p99'),
        'us_ratio': racer.against(base, 'p50', divide),
        'added_us': racer.against(base, 'p50', subtract),
        'added_p99_us': racer.against(base, 'p99', subtract),
        'way': way, 'reason': reason,
    }


def machine_of(bench, shape, *args):
    return Machine(bench.before if shape.before else bench.qemu,
                   [*shape.command(bench), *args],
                   tempfile.mkdtemp(dir=bench.directory))


def refusal(bench, shape):
    """What QEMU says against a save of the machine, or None"""
    if shape.before:
        return None
    with machine_of(bench, shape, '-S') as m:
        answer = m.try_qmp('x-snapshot-device-save', slot=0)
        return answer.get('error', {}).get('desc')


class Track:
    """
    Where machines run against one another. What the last ones ran against
    waits for the next, as it takes as long to start as they do.
    """

    def __init__(self, bench):
        self.bench = bench
        self.base = None
        self.worker = None      # the machine full of devices

    def close(self):
        for racer in self.base, self.worker:
            if racer:
                racer.__exit__()
        self.base = self.worker = None

    def _enter(self, shape, task=None):
        racer = Racer(self.bench, shape, task).__enter__()
        self._warm_up(racer)
        return racer

    def _warm_up(self, racer):
        """The first restores translate the guest's code."""
        racer.turn(WINDOW, 5 * self.bench.effort.turn_seconds)

    def _enter_base(self, shape):
        if not self.base or self.base.shape != shape:
            self.close()
            self.base = self._enter(shape)

    def busy(self, shape, name, task):
        """As machine(), of @shape with a device at work, against it without"""
        self._enter_base(shape)
        if not self.worker:
            self.worker = self._enter(shape, '')
        self.worker.again(task)
        self._warm_up(self.worker)
        self._run(self.worker, self.bench.effort.turns)
        return [{'what': 'busy', **result(self.worker, self.base),
                 'name': name}]

    def _run(self, racer, turns):
        self.base.turns = []
        for _ in range(turns):
            for runner in self.base, racer:
                runner.take_turn(WINDOW, self.bench.effort.turn_seconds)

    def machine(self, shape, base):
        """A list of one record, of @shape against @base"""
        why = missing(shape, self.bench) or missing(base, self.bench) or \
            refusal(self.bench, shape)
        if why:
            return [{'what': 'machines', 'name': shape.name, 'why': why}]
        return [self.race('machines', shape, base, self.bench.effort.turns)]

    def device(self, shape, base, category):
        turns = min(self.bench.effort.turns, 5)
        return [{'category': category,
                 **self.race('devices', shape, base, turns)}]

    def race(self, what, shape, base, turns):
        self._enter_base(base)
        racer = self._enter(shape)
        try:
            self._run(racer, turns)
        finally:
            racer.__exit__()
        return {'what': what, **result(racer, self.base)}

# SPDX-License-Identifier: GPL-2.0-or-later
"""
The fuzzing loop: runs a second of one guest, beside its restores alone and
AFL++'s ways to run the same source as a process. All take turns on one CPU.
"""

import contextlib
import os
from pathlib import Path
import re
import shutil
import subprocess
import tempfile
import time

from machine import BenchError, Machine
import stats

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / 'tests' / 'functional'

# What each takes, beside the loop itself, and what it is called
ALONE = 'restores alone'
LOOP = 'the loop'
AFL = 'afl-fuzz, on the loop'
SERVER = 'afl-fuzz, native fork server'
PERSISTENT = 'afl-fuzz, native persistent'
# The least of the restores' rate, and of the fork server's
GOAL_ALONE, GOAL_SERVER = 0.6, 3
# The least by which the demo's loop is faster than loadvm, which runs nothing
GOAL_LOADVM = 100

TOY = 'toy'
DEMO = 'kernel demo'
SEED = b'xx'
OPTIONS = ('-machine', 'q35', '-nodefaults', '-m', '32M', '-accel', 'tcg',
           '-rtc', 'clock=vm')
# Why afl-fuzz may refuse to start is of no interest here.
ENV = {'AFL_NO_UI': '1', 'AFL_SKIP_CPUFREQ': '1', 'AFL_NO_AFFINITY': '1',
       'AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES': '1'}


def find_afl():
    """The path of afl-fuzz, or None"""
    unpacked = sorted((ROOT / 'build' / 'afl').glob('*/bin/afl-fuzz'))
    return shutil.which('afl-fuzz') or (unpacked and str(unpacked[-1])) or None


def cpu():
    return min(os.sched_getaffinity(0))


def call(*command, **options):
    try:
        return subprocess.run(
            ['taskset', '-c', str(cpu()), *map(str, command)], check=True,
            text=True, errors='replace', stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, **options).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise BenchError(f'{command[0]}: {getattr(e, "stdout", None) or e}')


class Programs:
    """Those of the host's side, a native target, and the toy's machine"""

    def __init__(self, bench):
        self.directory = Path(tempfile.mkdtemp(dir=bench.directory))
        self.bench = bench
        call('make', '-C', ROOT / 'contrib' / 'snapshot' / 'host',
             f'O={self.directory}')
        call('gcc', '-O2', '-I', TESTS / 'snapshot', '-o',
             self.directory / 'native', TESTS / 'snapshot-host' / 'native.c')
        self.seeds = self.directory / 'seeds'
        self.seeds.mkdir()
        (self.seeds / 'seed').write_bytes(SEED)
        self.toy = self.directory / 'toy.vm'
        self.toy.write_text('\n'.join([
            f'qemu = {bench.qemu}', 'channel = 256K', 'console = other',
            *(' '.join(OPTIONS[i:i + 2]) for i in (0, 3, 5, 7)), '-nodefaults',
            f'-kernel {bench.image}', '-append case=fuzz stop=0',
            '-device isa-debugcon,iobase=0xe9,chardev=console', '']))

    def vm(self, command, *args):
        return call(self.directory / 'snapshot-vm', command, *args)


def alone(programs):
    """A context: the toy without a host, as Machine"""
    bench = programs.bench
    return Machine(bench.qemu, [*OPTIONS, '-display', 'none', '-kernel',
                                str(bench.image), '-append',
                                'case=fuzz alone=1', '-device', 'snapshot'],
                   tempfile.mkdtemp(dir=bench.directory))


def pin(pid):
    for task in os.listdir(f'/proc/{pid}/task'):
        os.sched_setaffinity(int(task), {cpu()})


def restores_in(m, seconds):
    """Restores a second of a machine that has stood still, and does after"""
    def ask():
        return m.qmp('x-query-snapshot-device')['restores'], time.monotonic()
    m.qmp('cont')
    before, start = ask()
    time.sleep(seconds)
    after, end = ask()
    m.qmp('stop')
    return (after - before) / (end - start)


def measure_loop(programs, description, seed, seconds):
    """(runs a second, us of a run in the guest)"""
    text = programs.vm('measure', description, seed, seconds)
    found = re.search(r'^(\d+) runs a second, ([\d.]+) us of each in the guest',
                      text, re.M)
    if not found:
        raise BenchError(f'snapshot-vm measure: {text}')
    return float(found[1]), float(found[2])


def campaign(programs, target, seconds):
    """Runs a second of afl-fuzz"""
    out = programs.directory / 'out'
    shutil.rmtree(out, ignore_errors=True)
    # It creates its directories in one that it does not take for temporary.
    text = call(find_afl(), '-i', programs.seeds, '-o', out, '-V',
                max(2, round(seconds)), '--', *target,
                env={**os.environ, **ENV, 'AFL_ALLOW_TMP': '1'})
    try:
        found = (out / 'default' / 'fuzzer_stats').read_text()
        return float(re.search(r'execs_per_sec +: ([\d.]+)', found)[1])
    except (OSError, TypeError):
        raise BenchError(f'afl-fuzz: {text[-2000:]}')


def toy(bench):
    """A list of records, one for each way"""
    programs = Programs(bench)
    seconds = bench.effort.loop_seconds
    bridge = programs.directory / 'afl-snapshot'
    native = programs.directory / 'native'
    rates, in_guest = {}, []
    with contextlib.ExitStack() as stack:
        m = stack.enter_context(alone(programs))
        m.wait_boot('the guest is there')
        pin(m.process.pid)
        restores_in(m, 0.2)
        stack.callback(programs.vm, 'stop', programs.toy)
        programs.vm('start', programs.toy)
        ways = {ALONE: lambda: restores_in(m, seconds)}
        if find_afl():
            ways |= {
                AFL: lambda: campaign(programs, [bridge, programs.toy],
                                      3 * seconds),
                SERVER: lambda: campaign(programs, [native], 3 * seconds),
                PERSISTENT: lambda: campaign(programs, [native, 'persistent'],
                                             3 * seconds),
            }
        for _ in range(bench.effort.loop):
            rate, us = measure_loop(programs, programs.toy,
                                    programs.seeds / 'seed', seconds)
            rates.setdefault(LOOP, []).append(rate)
            in_guest.append(us)
            for way, run in ways.items():
                rates.setdefault(way, []).append(run())
    records = [{'what': 'loop', 'guest': TOY, 'way': way,
                'per_second': stats.median(found),
                'ratio': stats.median([a / b for a, b in
                                       zip(found, rates[ALONE])]),
                'server': SERVER in rates and stats.median(
                    [a / b for a, b in zip(found, rates[SERVER])])}
               for way, found in rates.items()]
    # The loop's own restores are interrupted, as the host has its result before.
    guest_us = stats.median(in_guest)
    records[0] |= {'us': 1e6 / records[0]['per_second'], 'guest_us': guest_us,
                   'restore_us': 1e6 / stats.median(rates[ALONE]) - guest_us}
    if not find_afl():
        records.append({'what': 'loop', 'guest': TOY, 'way': AFL,
                        'why': 'there is no afl-fuzz: apt-get install afl++'})
    return records


def demo(bench):
    """A list of one record: Linux mounts an image, as make fuzz-demo has it"""
    made = ROOT / 'build' / 'fuzz-demo'
    what = {'what': 'loop', 'guest': DEMO, 'way': LOOP}
    if not (made / 'squashfs.vm').exists():
        return [{**what, 'why': 'there is no machine: run make fuzz-demo'}]
    programs = Programs(bench)
    description = made / 'squashfs.vm'
    try:
        programs.vm('start', description)
        seed = made / 'seeds' / 'squashfs' / 'image'
        found = [measure_loop(programs, description, seed,
                              bench.effort.loop_seconds)
                 for _ in range(bench.effort.loop)]
    finally:
        programs.vm('stop', description)
    rate = stats.median([rate for rate, _ in found])
    return [{**what, 'per_second': rate, 'us': 1e6 / rate,
             'guest_us': stats.median([us for _, us in found])}]

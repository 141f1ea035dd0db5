# SPDX-License-Identifier: GPL-2.0-or-later
"""
The fuzzing loop: runs a second of one guest, beside its restores alone and
AFL++'s ways to run the same source as a process. All have the same input, and
take turns on one CPU.
"""

import collections
import contextlib
import functools
import os
from pathlib import Path
import re
import shutil
import subprocess
import tempfile
import time

from snapshot.programs import pack

from machine import BenchError, Machine
import stats

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = ROOT / 'tests' / 'functional'
CONTRIB = ROOT / 'contrib' / 'snapshot'
XMLLINT = ROOT / 'build' / 'xmllint'

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
COUNTS = 'xmllint, counts itself'
COUNTED = 'xmllint, QEMU counts'
DEMO = 'kernel demo'
OPTIONS = ('-machine q35', '-nodefaults', '-accel tcg', '-rtc clock=vm')
XML = b'''\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE list [
  <!ELEMENT list (item*)>
  <!ELEMENT item (name, text?)>
  <!ATTLIST item id ID #REQUIRED kind CDATA "plain">
  <!ELEMENT name (#PCDATA)>
  <!ELEMENT text (#PCDATA)>
  <!ENTITY who "somebody">
]>
<list>
  <item id="a"><name>one</name><text>Hello, &who; &amp; all</text></item>
  <item id="b" kind="other"><name>two</name></item>
  <!-- a comment -->
  <item id="c"><name>three</name><text><![CDATA[<raw>]]></text></item>
</list>
'''
# Why afl-fuzz may refuse to start is of no interest here.
ENV = {'AFL_NO_UI': '1', 'AFL_SKIP_CPUFREQ': '1', 'AFL_NO_AFFINITY': '1',
       'AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES': '1',
       # It creates its directories in one that it does not take for temporary.
       'AFL_ALLOW_TMP': '1', 'AFL_CUSTOM_MUTATOR_ONLY': '1'}


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


# hosted: lines of a description. alone: options of the same machine without a
# host, which begins when it says @says. native: the command of each way
Guest = collections.namedtuple('Guest', 'name hosted alone says native')


def arguments(lines):
    """QEMU's, of lines as a description has them"""
    return [word for line in lines for word in line.split(' ', 1)]


class Programs:
    """What is made for one guest: the host's side, and the input"""

    def __init__(self, bench, seed=b''):
        self.directory = Path(tempfile.mkdtemp(dir=bench.directory))
        self.bench = bench
        call('make', '-C', CONTRIB / 'host', f'O={self.directory}')
        self.mutator = self.compile('same.so', HERE / 'same.c', '-shared',
                                    '-fPIC')
        self.seed = self.directory / 'seeds' / 'seed'
        self.seed.parent.mkdir()
        self.seed.write_bytes(seed)

    def compile(self, name, *args):
        path = self.directory / name
        call('gcc', '-O2', '-o', path, *args)
        return path

    def vm(self, command, *args):
        return call(self.directory / 'snapshot-vm', command, *args)

    def describe(self, guest):
        path = self.directory / 'vm'
        path.write_text('\n'.join([f'qemu = {self.bench.qemu}', *guest.hosted,
                                   '']))
        return path

    def alone(self, guest):
        """A context: the guest without a host, as Machine"""
        return Machine(self.bench.qemu, [*arguments(guest.alone), '-display',
                                         'none', '-device', 'snapshot'],
                       self.directory)


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
    """Runs a second of afl-fuzz, whose files are in memory"""
    with tempfile.TemporaryDirectory(dir='/dev/shm') as out:
        text = call(find_afl(), '-i', programs.seed.parent, '-o', out, '-t',
                    '2000', '-V', max(2, round(seconds)), '--', *target,
                    env={**os.environ, **ENV, 'AFL_CUSTOM_MUTATOR_LIBRARY':
                         str(programs.mutator)})
        try:
            found = Path(out, 'default', 'fuzzer_stats').read_text()
            return float(re.search(r'execs_per_sec +: ([\d.]+)', found)[1])
        except (OSError, TypeError):
            raise BenchError(f'afl-fuzz: {text[-2000:]}')


def records_of(guest, rates, in_guest):
    """One for each way, the loop's first; @in_guest: us of its runs"""
    records = [{'what': 'loop', 'guest': guest.name, 'way': way,
                'per_second': stats.median(found),
                'ratio': stats.median([a / b for a, b in
                                       zip(found, rates[ALONE])]),
                'server': SERVER in rates and stats.median(
                    [a / b for a, b in zip(found, rates[SERVER])])}
               for way, found in rates.items()]
    # Its own restores are interrupted, as the host has its result before.
    guest_us = stats.median(in_guest)
    records[0] |= {'us': 1e6 / records[0]['per_second'], 'guest_us': guest_us,
                   'restore_us': 1e6 / stats.median(rates[ALONE]) - guest_us}
    if AFL in rates:
        records[list(rates).index(AFL)]['engine_us'] = stats.median(
            [1e6 / a - 1e6 / b for a, b in zip(rates[AFL], rates[LOOP])])
    return records


def compare(programs, guest):
    """A list of records, also of what is missing"""
    effort = programs.bench.effort
    seconds = effort.loop_seconds
    description = programs.describe(guest)
    bridge = programs.directory / 'afl-snapshot'
    rates, in_guest = {}, []
    with contextlib.ExitStack() as stack:
        m = stack.enter_context(programs.alone(guest))
        m.wait_boot(guest.says)
        m.wait_restore()
        pin(m.process.pid)
        restores_in(m, 0.2)
        stack.callback(programs.vm, 'stop', description)
        programs.vm('start', description)
        said = programs.vm('run', description, programs.seed)
        if ': ok (' not in said:
            raise BenchError(f'snapshot-vm run: {said}')
        ways = {ALONE: lambda: restores_in(m, seconds)}
        if find_afl():
            ways |= {way: functools.partial(campaign, programs, command,
                                            3 * seconds) for way, command in
                     {AFL: [bridge, description], **guest.native}.items()}
        for _ in range(effort.loop):
            rate, us = measure_loop(programs, description, programs.seed,
                                    seconds)
            rates.setdefault(LOOP, []).append(rate)
            in_guest.append(us)
            for way, run in ways.items():
                rates.setdefault(way, []).append(run())
    missing = [] if find_afl() else [(AFL, 'there is no afl-fuzz: apt-get '
                                      'install afl++')]
    if not guest.native:
        missing.append((SERVER, 'it was not built: scripts/xmllint afl'))
    return records_of(guest, rates, in_guest) + [
        {'what': 'loop', 'guest': guest.name, 'way': way, 'why': why}
        for way, why in missing]


def toy(bench):
    programs = Programs(bench, b'xx')
    native = programs.compile('native', '-I', TESTS / 'snapshot',
                              TESTS / 'snapshot-host' / 'native.c')
    options = [*OPTIONS, '-m 32M', f'-kernel {bench.image}']
    return compare(programs, Guest(
        TOY, ['channel = 256K', 'console = other', *options,
              '-append case=fuzz stop=0',
              '-device isa-debugcon,iobase=0xe9,chardev=console'],
        [*options, '-append case=fuzz alone=1'], 'the guest is there',
        {SERVER: [native], PERSISTENT: [native, 'persistent']}))


def xmllint(bench, name):
    """Linux runs it, saved inside its start; natively, it is afl-cc's."""
    program = XMLLINT / ('guard' if name == COUNTS else 'plain') / 'xmllint'
    if not program.exists():
        return [{'what': 'loop', 'guest': name, 'way': LOOP, 'why':
                 f'it was not built: scripts/xmllint {program.parent.name}'}]
    programs = Programs(bench, XML)
    shim = programs.compile(
        'alone.so', '-shared', '-fPIC', '-DSEED="/opt/seed"', '-I', CONTRIB,
        '-I', ROOT / 'include', HERE / 'alone.c', CONTRIB / 'snapshot-cov.c')
    initramfs = programs.directory / 'initramfs'
    pack(bench.linux / 'initramfs', [program, shim, programs.seed], initramfs)
    # As the manual has it: no run depends on the host's time.
    options = [*OPTIONS, '-icount shift=3,sleep=off',
               '-cpu qemu64,-rdrand,-rdseed', '-m 128M',
               f'-kernel {bench.linux}/vmlinuz', f'-initrd {initramfs}']
    # A status of 1 says that it could not read the input.
    append = '-append console=ttyS0 quiet nokaslr mitigations=off ' \
        'snapshot.run=snapshot-run,-x,1,{}--,/opt/xmllint,--noout,@@'
    hosted, alone = [], []
    if name == COUNTED:
        hosted = ['coverage = tcg,mode=user']
        alone = ['-object memory-backend-memfd,id=map,size=64K,share=on',
                 '-object tcg-coverage,id=edges,memdev=map,mode=user']
    native = {way: [XMLLINT / 'afl' / file, '--noout', '@@']
              for way, file in ((SERVER, 'xmllint'),
                                (PERSISTENT, 'persistent'))}
    return compare(programs, Guest(
        name, ['boot = 300', *hosted, *options, append.format('')],
        [*alone, *options, '-serial chardev:console',
         append.format('-l,/opt/alone.so,')],
        'saves inside its start',
        native if (XMLLINT / 'afl' / 'persistent').exists() else {}))


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

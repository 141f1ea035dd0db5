# SPDX-License-Identifier: GPL-2.0-or-later
"""
Slots in files: how fast one is written, how soon a machine starts from one, what
many that share one take.  QEMU's own ways to do that are measured beside them.
"""

import contextlib
import json
import os
from pathlib import Path
import random
import re
import shutil
import subprocess
import tempfile
import time

from loop import OPTIONS, arguments, restores_in
from machine import BenchError, Machine
from measure import qemu_img
from snapshot_libvirt import NEWER, Libvirt, LibvirtError, missing
import stats

EXPORT = 'export of a slot'
# QEMU's own: a stopped machine, and its file brought to the disk
MIGRATIONS = {
    'migrate file:': (),
    'migrate, mapped-ram': ('mapped-ram',),
    'migrate, mapped-ram, multifd': ('mapped-ram', 'multifd'),
    'migrate, the same, direct-io': ('mapped-ram', 'multifd', 'direct-io'),
}
SAVEVM = 'savevm'
# What virsh's save is told
SPARSE = '--image-format', 'sparse'
VIRSH = {
    'virsh save': (),
    'virsh save, bypass-cache': ('--bypass-cache',),
    'virsh save, sparse': SPARSE,
    'virsh save, sparse, parallel': (*SPARSE, '--parallel-channels', '4'),
    'virsh save, the same, bypass-cache': (*SPARSE, '--parallel-channels', '4',
                                           '--bypass-cache'),
}
DOMAIN = '''
<domain type='qemu'>
  <name>bench</name>
  <memory unit='MiB'>{mib}</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/><apic/></features>
  <devices><emulator>{emulator}</emulator></devices>
</domain>
'''
# What it starts as QEMU: RAM with what the other ways save
EMULATOR = '''#!/usr/bin/env python3
import os, sys
args = ['{ram}' if '"id":"pc.ram"' in x else x for x in sys.argv[1:]]
os.execv('{qemu}', ['{qemu}', *args])
'''
FIO = 'fio, direct, as many bytes'
USED = 10, 90           # percent of RAM that are not zero
STARTS_USED = 10        # the same, where machines start

EMPTY = 'an empty machine'
WAYS = {EMPTY: '', 'load=, ram=dirty': 'dirty', 'load=, ram=remap': 'remap'}
INCOMING = '-incoming file:, mapped-ram'
# RAM is the file of a machine that was migrated without it.
TEMPLATE = 'migrate-incoming, x-ignore-shared'
RESTORE = 'virsh restore'
COLD = 'load=, ram=dirty, not in the page cache'
COLD_TOUCHED = f'{COLD}, touched='
# Up to the end of a run that touches so many pieces of so many bytes, anywhere
# in what is not zero
RUN_PIECES, RUN_PIECE = 256, 16 << 10
RUN = f'load=, ram=dirty, until {RUN_PIECES} places are touched'
COLD_RUN = f'{RUN}, not in the page cache'
COLD_RUN_TOUCHED = f'{COLD_RUN}, touched='
READ = 'to read what touched= lists, not in the page cache, in order'

# The least of fio's rate, the most of an empty machine's start
GOAL_SAVE, GOAL_START = 0.9, 1.2
# The most of a start from the page cache, and of reading what is touched
GOAL_COLD = 1.2
# MiB beside what a worker has written to, and the least of the restores a second
# of a machine that saved itself
GOAL_WORKER_MIB, GOAL_WORKER = 60, 0.95
WORKER_MIB = 1024


def base(mib):
    return ['-machine', 'q35', '-accel', 'tcg', '-nodefaults', '-display',
            'none', '-m', f'{mib}M']


def ram(directory, mib, share='off'):
    return ['-object', f'memory-backend-file,id=pc.ram,size={mib}M,'
            f'mem-path={directory}/ram,share={share}', '-machine',
            'memory-backend=pc.ram']


def fill(directory, mib, percent):
    """A file to be the RAM of a machine, of which so much is not zero"""
    noise = os.urandom(1 << 20)
    with open(f'{directory}/ram', 'wb') as f:
        # Each page has to be another one, or a file system might find out.
        for i in range(mib * percent // 100):
            f.write(i.to_bytes(8, 'little') + noise[8:])
        f.truncate(mib << 20)


def written(path):
    return os.stat(path).st_blocks * 512


def wait_job(m, job, timeout=600):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found = [j for j in m.qmp('query-jobs') if j['id'] == job]
        if found and found[0]['status'] == 'concluded':
            m.qmp('job-dismiss', id=job)
            if 'error' in found[0]:
                m.fail(found[0]['error'])
            return
        time.sleep(0.002)
    m.fail(f'{job} does not end')


def export(m, path):
    """Seconds that the command takes, while the guest stands; and in all"""
    start = time.monotonic()
    m.qmp('x-snapshot-device-export', job_id='bench', slot=0, file=path)
    stood = time.monotonic() - start
    wait_job(m, 'bench')
    return stood, time.monotonic() - start


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def set_capabilities(m, names):
    m.qmp('migrate-set-capabilities', capabilities=[
        {'capability': name, 'state': True} for name in names])


def migrate(m, path, capabilities):
    set_capabilities(m, [x for x in capabilities if x != 'direct-io'])
    m.qmp('migrate-set-parameters', max_bandwidth=1 << 40,
          **({'multifd_channels': 4} if 'multifd' in capabilities else {}),
          **({'direct_io': True} if 'direct-io' in capabilities else {}))
    start = time.monotonic()
    m.qmp('migrate', uri=f'file:{path}')
    while (status := m.qmp('query-migrate')['status']) != 'completed':
        if status in ('failed', 'cancelled'):
            raise BenchError(f'migrate {capabilities}: {status}')
        time.sleep(0.002)
    sync(path)
    return time.monotonic() - start


def savevm(m, path):
    start = time.monotonic()
    m.hmp('savevm bench')
    sync(path)
    return time.monotonic() - start


class Domain:
    """A machine as libvirt makes it, with virsh's times in seconds"""

    def __init__(self, libvirt, bench, directory, mib):
        self.libvirt = libvirt
        self.path = f'{directory}/saved'
        self.xml = Path(directory, 'xml')
        emulator = Path(directory, 'emulator')
        emulator.write_text(EMULATOR.format(qemu=bench.qemu, ram=json.dumps({
            'qom-type': 'memory-backend-file', 'id': 'pc.ram',
            'size': mib << 20, 'mem-path': f'{directory}/ram',
            'share': False})))
        emulator.chmod(0o755)
        self.xml.write_text(DOMAIN.format(mib=mib, emulator=emulator))

    def create(self, *options):
        self.libvirt.virsh('create', *options, str(self.xml))

    def destroy(self):
        self.libvirt.virsh('destroy', 'bench')

    def save(self, *options):
        if options[:2] == SPARSE and not self.libvirt.sparse():
            version = self.libvirt.virsh('--version')
            raise LibvirtError(f'libvirt {version} has no --image-format, '
                               '11.2 has: as root, run scripts/fetch-libvirt')
        start = time.monotonic()
        self.libvirt.virsh('save', 'bench', self.path, *options)
        sync(self.path)
        return time.monotonic() - start

    def restore(self):
        start = time.monotonic()
        self.libvirt.virsh('restore', self.path)
        return time.monotonic() - start


@contextlib.contextmanager
def domain(bench, mib, percent):
    """A Domain with so much of its RAM not zero, of the newest libvirt"""
    root = None if missing(NEWER) else NEWER
    why = missing(root)
    if why:
        raise LibvirtError(why)
    with tempfile.TemporaryDirectory(prefix='virt') as directory:
        fill(directory, mib, percent)
        with Libvirt(directory, f'{bench.directory}/libvirtd.log',
                     root) as libvirt:
            why = libvirt.refusal(bench.qemu)
            if why:
                raise LibvirtError(f'nobody cannot run {bench.qemu}: {why}')
            yield Domain(libvirt, bench, directory, mib)


def _virsh_save(bench, d, options):
    """What a record has of it; beside fio's rate each time"""
    rates, ratios = [], []
    for _ in range(bench.effort.saves):
        d.create('--paused')
        try:
            seconds = d.save(*options)
        except LibvirtError:
            d.destroy()
            raise
        size = written(d.path)
        os.unlink(d.path)
        rates.append(size / seconds)
        limit = fio(bench.directory, size)
        ratios += [rates[-1] / limit] if limit else []
    return {'rate': stats.median(rates),
            'ratio': bool(ratios) and stats.median(ratios)}


def virsh_saves(bench, mib, percent, name):
    """Records, one for each way of VIRSH"""
    found = {}
    try:
        with domain(bench, mib, percent) as d:
            for way, options in VIRSH.items():
                try:
                    found[way] = _virsh_save(bench, d, options)
                except LibvirtError as e:
                    found[way] = {'why': str(e)}
    except LibvirtError as e:
        found = {way: {'why': str(e)} for way in VIRSH}
    return [{'what': 'files', 'name': name, 'way': way, **record}
            for way, record in found.items()]


def virsh_restore_ms(bench, mib):
    """Milliseconds, one for each start"""
    times = []
    with domain(bench, mib, STARTS_USED) as d:
        d.create()
        d.save()
        for _ in range(bench.effort.starts):
            times.append(1000 * d.restore())
            d.destroy()
    return times


def fio(directory, size):
    """Bytes a second, of four writers, or None"""
    if not shutil.which('fio'):
        return None
    said = subprocess.run(
        ['fio', '--name=bench', f'--directory={directory}', '--rw=write',
         '--bs=1M', '--direct=1', '--ioengine=psync', '--numjobs=4',
         f'--size={max(size // 4, 1 << 20)}', '--end_fsync=1',
         '--group_reporting', '--output-format=json', '--unlink=1'],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    write = json.loads(said[said.index(b'{'):])['jobs'][0]['write']
    return write['io_bytes'] / (write['runtime'] / 1000)


def save(bench, percent):
    """A list of records, one for each way to save a machine"""
    with tempfile.TemporaryDirectory(dir=bench.directory) as directory:
        mib = bench.effort.save_mib
        # What is RAM, a file of it, and one more by another way
        while 4 * (mib << 20) * percent // 100 > \
                shutil.disk_usage(directory).free:
            mib //= 2
        records = _save(bench, directory, mib, percent)
    return records + virsh_saves(bench, mib, percent, records[0]['name'])


def _save(bench, directory, mib, percent):
    rates, stood = {}, []
    fill(directory, mib, percent)
    path = f'{directory}/file'
    image = f'{directory}/image'

    def machine(*more):
        return Machine(bench.qemu, [*base(mib), *ram(directory, mib), '-S',
                                    *more], directory)

    def add(way, seconds, size):
        rates.setdefault(way, []).append(size / seconds)

    for _ in range(bench.effort.saves):
        with machine('-device', 'snapshot') as m:
            m.qmp('x-snapshot-device-save', slot=0)
            # The first touches what was never touched. The others' files are
            # new ones, too: to remove what was in one takes a fifth more.
            export(m, path)
            os.unlink(path)
            stands, seconds = export(m, path)
            stood.append(stands)
            add(EXPORT, seconds, written(path))
        size = written(path)
        for way, capabilities in MIGRATIONS.items():
            os.unlink(path)
            with machine() as m:
                add(way, migrate(m, path, capabilities), size)
        subprocess.run([qemu_img(bench.qemu), 'create', '-q', '-f', 'qcow2', image,
                        f'{8 * mib}M'], check=True)
        with machine('-drive', f'file={image},if=none') as m:
            add(SAVEVM, savevm(m, image), size)
        os.unlink(image)
        rate = fio(directory, size)
        if rate:
            rates.setdefault(FIO, []).append(rate)
    records = [{'what': 'files', 'name': f'save, {percent} % of {mib} MiB used',
                'way': way, 'rate': stats.median(found),
                'ratio': FIO in rates and stats.median(
                    [a / b for a, b in zip(found, rates[FIO])])}
               for way, found in rates.items()]
    records[0]['stood_ms'] = 1000 * stats.median(stood)
    if FIO not in rates:
        records.append({'what': 'files', 'name': records[0]['name'],
                        'way': FIO, 'why': 'there is no fio: apt-get install '
                        'fio'})
    return records


def start_ms(bench, args, directory):
    """Until the guest runs; what is deferred comes without RAM"""
    with Machine(bench.qemu, args, directory) as m:
        if 'defer' in args:
            set_capabilities(m, ['x-ignore-shared'])
            m.qmp('migrate-incoming', uri=f'file:{directory}/template')
        return 1000 * (m.wait_event('RESUME') - m.started) \
            if not m.qmp('query-status')['running'] else \
            1000 * (time.monotonic() - m.started)


def forget(path):
    """Let the host's page cache have nothing of a file"""
    sync(path)
    # What a machine that was killed has asked for is still being read.
    time.sleep(0.3)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def run_ms(bench, args, directory, mib, end=False):
    """Until the guest runs, and until what the first run touches is touched"""
    used = (mib << 20) * STARTS_USED // 100
    places = random.Random(0).sample(range(1 << 20, used, RUN_PIECE),
                                     RUN_PIECES)
    with Machine(bench.qemu, args, directory) as m:
        m.qmp('query-status')
        begun = time.monotonic()
        for place in places:
            m.qmp('pmemsave', val=place, size=RUN_PIECE,
                  filename='/dev/null')
        ended = time.monotonic()
        if end:
            m.qmp('x-snapshot-device-restore', slot=0)
        return 1000 * (begun - m.started), 1000 * (ended - m.started)


def read_ms(path, touched):
    """To read the ranges of a list in their order"""
    with open(touched, encoding='ascii') as f:
        ranges = [[int(x, 16) for x in line.split()]
                  for line in f.read().splitlines()[2:]]
    fd = os.open(path, os.O_RDONLY)
    begin = time.monotonic()
    for offset, length in ranges:
        os.pread(fd, length, offset)
    ms = 1000 * (time.monotonic() - begin)
    os.close(fd)
    return ms


def cold_starts(bench, args, path, directory, mib, times):
    """One round with the file not in the page cache, and one from there"""
    touched = f'{directory}/touched'
    ahead = [*args[:-1], f'{args[-1]},touched={touched}']
    if not os.path.exists(touched):
        run_ms(bench, ahead, directory, mib, end=True)
    for start, run, these in ((None, RUN, args), (COLD, COLD_RUN, args),
                              (COLD_TOUCHED, COLD_RUN_TOUCHED, ahead)):
        if start:
            forget(path)
        ms = run_ms(bench, these, directory, mib)
        for way, found in (start, ms[0]), (run, ms[1]):
            if way:
                times.setdefault(way, []).append(found)
    forget(path)
    times.setdefault(READ, []).append(read_ms(path, touched))


def starts(bench, mib):
    """A list of records, one for each way to start"""
    directory = tempfile.mkdtemp(dir=bench.directory)
    path = f'{directory}/file'
    fill(directory, mib, STARTS_USED)
    with Machine(bench.qemu, [*base(mib), *ram(directory, mib), '-device',
                              'snapshot'], directory) as m:
        m.qmp('x-snapshot-device-save', slot=0)
        export(m, path)
    with Machine(bench.qemu, [*base(mib), *ram(directory, mib, share='on')],
                 directory) as m:
        migrate(m, f'{directory}/template', ['x-ignore-shared'])
    ways = {way: [*base(mib), '-device', f'snapshot,ram={mode},load={path}' if
                  mode else 'snapshot'] for way, mode in WAYS.items()}
    ways[INCOMING] = [*base(mib), '-global', 'migration.mapped-ram=on',
                      '-incoming', f'file:{path}']
    ways[TEMPLATE] = [*base(mib), *ram(directory, mib), '-incoming', 'defer']
    times = {}
    for _ in range(bench.effort.starts):
        for way, args in ways.items():
            times.setdefault(way, []).append(start_ms(bench, args, directory))
        cold_starts(bench, ways['load=, ram=dirty'], path, directory, mib,
                    times)
    shutil.rmtree(directory)
    skipped = []
    try:
        times[RESTORE] = virsh_restore_ms(bench, mib)
    except LibvirtError as e:
        skipped = [{'what': 'files', 'name': f'start, {mib} MiB',
                    'way': RESTORE, 'why': str(e)}]
    middle = {way: stats.median(found) for way, found in times.items()}
    limits = {COLD_TOUCHED: middle['load=, ram=dirty'] + middle[READ],
              COLD_RUN_TOUCHED: middle[RUN] + middle[READ]}
    return [{'what': 'files', 'name': f'start, {mib} MiB', 'way': way,
             'ms': found, 'ratio': found / middle[EMPTY],
             **({'of_reading': found / limits[way]} if way in limits else {})}
            for way, found in middle.items()] + skipped


def toy(bench, directory, *more):
    return Machine(bench.qemu, [*arguments(OPTIONS), '-m', f'{WORKER_MIB}M',
                                '-display', 'none', '-kernel',
                                str(bench.image), '-append',
                                'case=fuzz alone=1', '-device',
                                ','.join(['snapshot', *more])], directory)


def memory_mib(m):
    with open(f'/proc/{m.process.pid}/smaps_rollup', encoding='ascii') as f:
        return int(re.search(r'^Pss: +(\d+) kB', f.read(), re.M)[1]) / 1024


def workers(bench):
    """Records: a machine that saved itself, and many that share its file"""
    directory = tempfile.mkdtemp(dir=bench.directory)
    path = f'{directory}/file'
    count = bench.effort.workers
    rates = {'itself': [], 'a file': []}
    alone, all_started, pss = [], [], []
    with toy(bench, directory) as m:
        m.wait_restore()
        m.qmp('stop')
        export(m, path)
        load = f'load={path}'
        with toy(bench, tempfile.mkdtemp(dir=directory), load) as w:
            w.qmp('stop')
            for _ in range(bench.effort.turns):
                for name, of in ('itself', m), ('a file', w):
                    rates[name].append(restores_in(
                        of, bench.effort.turn_seconds))
    for _ in range(3):
        begin = time.monotonic()
        with toy(bench, tempfile.mkdtemp(dir=directory), load):
            alone.append(time.monotonic() - begin)
    with contextlib.ExitStack() as stack:
        begin = time.monotonic()
        machines = []
        for _ in range(count):
            machines.append(stack.enter_context(
                toy(bench, tempfile.mkdtemp(dir=directory), load)))
            all_started.append(time.monotonic() - begin)
        for m in machines:
            m.qmp('stop')
        pss = [memory_mib(m) for m in machines]
    shutil.rmtree(directory)
    return [{'what': 'files', 'name': f'{count} workers, {WORKER_MIB} MiB',
             'way': 'all', 'count': count,
             'rate_ratio': stats.median([a / b for a, b in zip(
                 rates['a file'], rates['itself'])]),
             'start_ms': 1000 * all_started[-1],
             'start_ratio': all_started[-1] / count / stats.median(alone),
             'pss_mib': stats.median(pss), 'pss_most_mib': max(pss)}]

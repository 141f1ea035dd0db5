# SPDX-License-Identifier: GPL-2.0-or-later
"""
What restores shall reach, beside what they reach, and the ratios that stand
for it. All is computed from the records of one run: see measure.py.
"""

import collections

import devices
import disks
import files
import loop

# measured and plain: text, or None; met: None if it was not measured
Row = collections.namedtuple('Row', 'what plain prototype goal measured met '
                                    'why')
# higher: is a higher ratio better? value: None if it was not measured, why: it
# could not be
Ratio = collections.namedtuple('Ratio', 'name value higher why')

# Against a machine that takes turns with it: the record, what it is called, the
# least part of the other's rate that it shall reach
MACHINES = (
    ('default pc', 'default pc', 0.6),
    ('default q35', 'default q35', 0.6),
    ('OVMF, writable variables', 'q35, OVMF with writable variables', 0.6),
    ('as libvirt makes it', 'q35, as libvirt makes it', 0.4),
    ('-smp 2', 'q35 -smp 2, of -smp 1', 0.8),
    ('-smp 4', 'q35 -smp 4, of -smp 1', 0.6),
    ('-smp 8', 'q35 -smp 8, of -smp 1', 0.4),
)
ADDED = 3, 10           # us by an idle device: nine of ten, and each
ADDED_BUSY = 100
ADDED_DISK = 1
KVM_SMP = 'KVM, bare, -smp 2, virtio'


class Records:
    """The records of a run, to be asked for by what they measured"""

    def __init__(self, results):
        self.records = results['records']
        self.skipped = dict(results['skipped'])
        # Lists that results of an older run do not have
        self.machines = {m['name']: m for m in results.get('machines', [])}
        self.devices = results.get('devices', [])
        self.busy = results.get('busy', [])
        self.calls = results.get('calls', [])
        self.disks = {d['clusters']: d for d in results.get('disks', [])}
        # Older results have no ways.
        self.in_flight = {x['way']: x for x in results.get('in_flight', [])
                          if 'way' in x}
        self.back = results.get('back', [])
        self.throughput = results.get('throughput', [])
        self.loop = results.get('loop', [])
        self.files = results.get('files', [])

    def all(self, **wanted):
        return [r for r in self.records if wanted.items() <= r.items()]

    def get(self, engine, guest=None, machine=None, ram=None, pages=10,
            accel='tcg', smp=1, virtio=False):
        found = self.all(engine=engine, guest=guest, machine=machine,
                         accel=accel, smp=smp, virtio=virtio, pages=pages,
                         **({'ram': ram} if ram else {}))
        return found[0] if found else None

    def bare(self, engine='dirty', machine='pc', ram=128, **rest):
        return self.get(engine, 'bare', machine, ram, **rest)

    def linux(self, engine='dirty', machine='q35', ram=256, **rest):
        return self.get(engine, 'linux', machine, ram, **rest)

    def machine(self, name):
        """What was measured of it, empty if nothing was, and why not"""
        record = self.machines.get(name, {})
        return ({}, record['why']) if 'why' in record else (record, None)

    def calls_of(self, name, binary='now'):
        """System calls for each restore, in all, or None; why not"""
        found = [c for c in self.calls
                 if (c['name'], c['binary']) == (name, binary)]
        return (found[0].get('total'), found[0].get('why')) if found \
            else (None, None)

    def loop_of(self, guest, way):
        """What was measured of it, empty if nothing was, and why not"""
        record = next((x for x in self.loop
                       if (x['guest'], x['way']) == (guest, way)), {})
        return ({}, record['why']) if 'why' in record else (record, None)

    def files_of(self, way):
        """Those that measured it, in the order of the run"""
        return [x for x in self.files if x['way'] == way and 'why' not in x]

    def floor(self, engine, pages):
        return self.get(engine, pages=pages, accel=None)

    def pages(self, **wanted):
        """Records that differ in the number of pages, by that"""
        return sorted(self.all(**wanted), key=lambda r: r['pages'])


def divide(over, under):
    return over / under if over and under else None


def per_second(record):
    return record and record['per_second']


def median(record):
    return record and record['us']['median']


def thousands(rate):
    """Restores per second"""
    if rate is None:
        return None
    if rate < 999.5:
        return f'{rate:.3g}'
    return f'{rate / 1000:.1f}k' if rate < 99950 else f'{rate / 1000:.0f}k'


def times(ratio):
    if ratio is None:
        return None
    return f'{ratio:.0f}×' if ratio >= 100 else f'{ratio:.3g}×'


def rows(r):
    """The tables of goals of issues 4, 13 and 14"""
    result = []

    def rate(what, ours, plain, prototype, goal):
        value = per_second(ours)
        result.append(Row(what, thousands(per_second(plain)), prototype,
                          f'≥ {goal / 1000:g}k/s', thousands(value),
                          value and value >= goal, None))

    def ratio(what, value, prototype, goal, most=True, plain=None, why=None):
        met = value and (value <= goal if most else value >= goal)
        result.append(Row(what, plain, prototype,
                          f'{"≤" if most else "≥"} {goal:g}×', times(value),
                          met, why))

    for machine in 'pc', 'q35':
        for pages, prototype, goal in ((1, '30k', 60000), (10, '26k', 45000),
                                       (100, '11k', 15000),
                                       (1000, '1.7k', 2200)):
            rate(f'TCG bare metal, {machine} 128M, {pages} pages',
                 r.bare(machine=machine, pages=pages),
                 r.bare('remap', machine, pages=pages), prototype, goal)
    result.append(Row('memcpy of 1000 pages', None, '-', '-',
                      thousands(per_second(r.floor('memcpy', 1000))), None,
                      'no restore is faster'))
    for ram in 256, 1024:
        rate(f'TCG Linux, q35 {ram}M, 10 pages', r.linux(ram=ram),
             r.linux('remap', ram=ram), '18k', 35000)
    rate('the same, 256M, virtio-blk, -net, -serial idle',
         r.linux(virtio=True), r.linux('remap', virtio=True), '0.85k', 20000)
    for smp, prototype, goal in (2, '1–9k', 15000), (4, '5–7k', 10000):
        rate(f'TCG Linux, q35 256M, -smp {smp}, 10 pages', r.linux(smp=smp),
             r.linux('remap', smp=smp), prototype, goal)
    for machine in 'pc', 'q35':
        ratio(f'KVM bare metal, {machine} 128M, 10 pages, against plain',
              kvm_over_plain(r, machine), '4.5×', 6, most=False, plain='1×',
              why=r.skipped.get('KVM'))
    for pages in 100, 1000, 10000:
        ratio(f'RAM phase against memcpy, {pages} pages',
              ram_over_memcpy(r, pages), '2×', 1.3)
    ratio('restore of 8G against 128M, pc, 10 pages', large_over_small(r),
          '4×', 1.2)
    for what, record in (('bare metal, pc', r.bare()),
                         ('bare metal, q35', r.bare(machine='q35')),
                         ('Linux, q35', r.linux())):
        ratio(f'p99 against median, {what}, 10 pages', tail(record), '1.6–3×',
              2)
    result.append(Row('p99 against median, memcpy of 100 pages', None, '-',
                      '-', times(tail(r.floor('memcpy', 100))), None,
                      "what the host's own interrupts do"))
    ratio('loadvm against a restore, Linux, q35 256M, 10 pages',
          stock_over_ours(r, 'loadvm'), '2000×', 3000, most=False,
          plain=times(divide(median(r.linux('loadvm')),
                             median(r.linux('remap')))))

    for name, what, goal in MACHINES:
        record, why = r.machine(name)
        ratio(f'{what}: rate, of -nodefaults' if goal_of_defaults(name)
              else f'{what}: rate', record.get('rate_ratio'), '-', goal,
              most=False, why=why)
    record, why = r.machine('now')
    ratio('fixed part, bare metal, pc, against the older binary',
          record.get('us_ratio'), '-', 0.7, why=why)
    record, why = r.machine(KVM_SMP)
    ratio('KVM -smp 2 with virtio against -smp 1, time',
          record.get('us_ratio'), '-', 2, why=why)
    value, why = calls_over_before(r, 'KVM, bare')
    ratio('system calls, KVM -smp 1, against the older binary', value, '-',
          0.6, why=why)

    def added(what, value, goal, skipped):
        result.append(Row(what, None, '-', f'≤ {goal} µs',
                          None if value is None else f'{value:.1f} µs',
                          None if value is None else value <= goal,
                          r.skipped.get(skipped, skipped)))

    record, why = r.machine('a disk, writable')
    added('a writable disk that is idle adds', record.get('added_us'),
          ADDED_DISK, why)
    for clusters, record in r.disks.items():
        added(f'a disk of which {clusters} clusters were written adds',
              median(record), disks.goal(clusters), None)
    late = [x['us']['p99'] for x in r.in_flight.values()]
    added(f'{disks.REQUESTS} requests in flight: adds to what they need, p99',
          late[0] - late[1] if late and None not in late else None,
          disks.GOAL_AFTER,
          'fewer than 100 restores')
    for record in r.throughput:
        if record['way'] == 'overlay':
            ratio(f'{record["pattern"]}, of the image alone', record['ratio'],
                  '-', disks.GOAL_THROUGHPUT, most=False)
    record, why = r.loop_of(loop.TOY, loop.LOOP)
    ratio('the fuzzing loop, toy: rate, of its restores alone',
          record.get('ratio'), '-', loop.GOAL_ALONE, most=False, why=why)
    record, why = r.loop_of(loop.TOY, loop.AFL)
    ratio('the same by afl-fuzz: rate, of its native fork server',
          record.get('server'), '-', loop.GOAL_SERVER, most=False, why=why)
    value, why = demo_over_loadvm(r)
    ratio('the fuzzing loop, kernel demo: rate, of loadvm alone', value, '-',
          loop.GOAL_LOADVM, most=False, why=why)
    for x in r.files_of(files.EXPORT):
        ratio(f'{x["name"]}: rate of an export, of fio', x['ratio'] or None,
              '-', files.GOAL_SAVE, most=False,
              why=None if x['ratio'] else 'there is no fio')
    for way in files.WAYS:
        for x in r.files_of(way) if way != files.EMPTY else ():
            ratio(f'{x["name"]}, {way}: time, of an empty machine', x['ratio'],
                  '-', files.GOAL_START)
    for way in files.COLD_TOUCHED, files.COLD_RUN_TOUCHED:
        for x in r.files_of(way):
            ratio(f'{x["name"]}, {way}: time, of the same from the page cache '
                  'and of reading what is touched', x['of_reading'], '-',
                  files.GOAL_COLD)
    for x in r.files_of('all'):
        ratio(f'{x["name"]}: restores a second, of one that saved itself',
              x['rate_ratio'], '-', files.GOAL_WORKER, most=False)
        result.append(Row(f'{x["name"]}: memory of each', None, '-',
                          f'≤ {files.GOAL_WORKER_MIB} MiB',
                          f'{x["pss_mib"]:.1f} MiB',
                          x['pss_mib'] <= files.GOAL_WORKER_MIB, None))
    added('an idle device adds, nine of ten', devices.nine_of_ten(r), ADDED[0],
          'each device')
    for what, records, goal, skipped in (
            ('an idle', devices.measured(r), ADDED[1], 'each device'),
            ('a busy', r.busy, ADDED_BUSY, 'busy devices')):
        most = devices.dearest(records)
        added(f'{what} device adds, the dearest'
              f'{": " + most["name"] if most else ""}',
              most and most['added_us'], goal, skipped)
    return result


def goal_of_defaults(name):
    return not name.startswith('-smp')


def calls_over_before(r, name):
    """Why it is None, too"""
    now, why = r.calls_of(name)
    before, why_before = r.calls_of(name, 'before')
    return divide(now, before), why or why_before or (
        None if before else 'no older binary was given: make bench BEFORE=path')


def demo_over_loadvm(r):
    """Why it is None, too.  loadvm is measured of a Linux of 256M."""
    record, why = r.loop_of(loop.DEMO, loop.LOOP)
    loadvm = median(r.linux('loadvm'))
    return (record['per_second'] * loadvm / 1e6 if record and loadvm
            else None), why


def kvm_over_plain(r, machine, rate=per_second):
    return divide(rate(r.bare('dirty', machine, accel='kvm')),
                  rate(r.bare('remap', machine, accel='kvm')))


def ram_over_memcpy(r, pages, phases='phases_us', cost=median):
    ours = r.bare(pages=pages)
    return divide(ours and ours[phases]['ram'],
                  cost(r.floor('memcpy', pages)))


def large_over_small(r, cost=median):
    return divide(cost(r.bare(ram=8192)), cost(r.bare()))


def tail(record):
    return record and divide(record['us']['p99'], record['us']['median'])


def stock_over_ours(r, engine, cost=median):
    return divide(cost(r.linux(engine)), cost(r.linux()))


def cluster_over_memcpy(r):
    """What each of 10,000 clusters of a disk costs, of a page of RAM"""
    return divide(quiet(r.disks.get(10000)),
                  divide(quiet(r.floor('memcpy', 1000)), 0.1))


def quiet(record):
    return record and record['us']['p10']


def quiet_rate(record):
    return record and record['per_second_p90']


def ratios(r):
    """
    What scripts/bench --check compares with the reference. Ratios of one run,
    never times: those are another on each host, and each day. And of its quiet
    moments: in the others, the two that are compared do not suffer alike.
    """
    found = []

    def add(name, value, higher=True, why=None):
        found.append(Ratio(name, value or None, higher, why))

    def over(name, ours, other):
        add(name, divide(quiet_rate(ours), quiet_rate(other)))

    for machine in 'pc', 'q35':
        for pages in 10, 1000:
            over(f'rate dirty/plain, {machine} bare, {pages} pages',
                 r.bare(machine=machine, pages=pages),
                 r.bare('remap', machine, pages=pages))
    over('rate dirty/plain, q35 Linux, 10 pages', r.linux(),
         r.linux('remap'))
    over('rate virtio/none, q35 Linux', r.linux(virtio=True), r.linux())
    for smp in 2, 4:
        over(f'rate smp {smp}/1, q35 Linux', r.linux(smp=smp), r.linux())
    over('rate 1G/256M, q35 Linux', r.linux(ram=1024), r.linux())
    for machine in 'pc', 'q35':
        add(f'rate KVM/plain, {machine} bare',
            kvm_over_plain(r, machine, quiet_rate), why=r.skipped.get('KVM'))
    for pages in 100, 1000:
        add(f'RAM phase/memcpy, {pages} pages',
            ram_over_memcpy(r, pages, 'phases_p10_us', quiet), False)
    add('8G/128M, pc bare, 10 pages', large_over_small(r, quiet), False)
    add('loadvm/ours, q35 Linux', stock_over_ours(r, 'loadvm', quiet))

    for name, _, _ in MACHINES:
        record, why = r.machine(name)
        add(f'rate {name}/plain machine', record.get('rate_ratio'), why=why)
    for name, record in ('time now/before, pc bare', 'now'), \
            ('time KVM smp 2 with virtio/smp 1', KVM_SMP):
        record, why = r.machine(record)
        add(name, record.get('us_ratio'), False, why)
    record, why = r.machine('a disk, writable')
    add('time with a writable disk/a read-only one', record.get('us_ratio'),
        False, why)
    add('throughput overlay/image, the least',
        min((t['ratio'] for t in r.throughput if t['way'] == 'overlay'),
            default=None))
    record, why = r.loop_of(loop.TOY, loop.LOOP)
    add('rate fuzzing loop/restores alone, toy', record.get('ratio'), why=why)
    add('a cluster of a disk/memcpy of a page', cluster_over_memcpy(r), False)
    value, why = calls_over_before(r, 'KVM, bare')
    add('system calls now/before, KVM bare', value, False, why)
    ratios_of = sorted(d['us_ratio'] for d in r.devices)
    for what, n in (('nine of ten', 9 * len(ratios_of) // 10),
                    ('the dearest', -1)):
        add(f'time with a device/without, {what}',
            ratios_of and ratios_of[n], False, r.skipped.get('each device'))
    add('time with a busy device/an idle one, the dearest',
        max((d['us_ratio'] for d in r.busy), default=None), False,
        r.skipped.get('busy devices'))
    return found

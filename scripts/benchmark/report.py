# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables of a run: on the terminal, and for the documentation"""

import textwrap

import devices
from disks import BACK, REQUESTS, WAYS_BACK
from goals import Records, rows, thousands, times
from machine import PHASES
import stats
from stats import fit_line

# What the engines are called where they are compared
NAMES = {
    'dirty': 'snapshot device, ram=dirty',
    'remap': 'snapshot device, ram=remap',
    'loadvm': 'loadvm',
    'snapshot-load': 'snapshot-load (QMP)',
    'incoming': 'new process, -incoming file:',
    'memcpy': 'memcpy of the pages',
    'fork': 'fork of a process, 128M',
}


def number(value):
    """A time in microseconds, in three digits"""
    if value is None:
        return '-'
    if abs(value) >= 99.5:
        return f'{value:,.0f}'
    return f'{value:.1f}' if abs(value) >= 9.95 else f'{value:.2f}'


def table(head, lines, left=1):
    """Text in columns, the first @left of them aligned to the left"""
    lines = [[str(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in [head] + lines)
              for i in range(len(head))]
    for line in [head] + lines:
        yield '  '.join(f'{cell:<{width}}' if i < left else f'{cell:>{width}}'
                        for i, (cell, width) in enumerate(zip(line, widths))
                        ).rstrip()


def rst_table(head, lines):
    yield from ('.. list-table::', '   :header-rows: 1', '')
    for line in [head] + lines:
        for i, cell in enumerate(line):
            yield f'   {"*" if i == 0 else " "} - {cell}'.rstrip()
    yield ''


# Each of the following returns a table: its title, head and lines

def goals(r):
    lines = []
    for row in rows(r):
        verdict = {True: 'met', False: 'not met'}.get(
            row.met, row.why or 'not measured')
        lines.append([row.what, row.plain or '-', row.prototype, row.goal,
                      row.measured or '-', verdict])
    return ('Goals (k: thousand restores a second)',
            ['', 'plain', 'prototype', 'goal', 'measured', ''], lines)


def name_of(record):
    if record['guest'] is None:
        return '-'
    smp = f', -smp {record["smp"]}' if record['smp'] > 1 else ''
    virtio = ', virtio' if record['virtio'] else ''
    size = record['ram']
    size = f'{size}M' if size < 1024 else f'{size >> 10}G'
    return (f'{record["accel"].upper()}, {record["machine"]} {size}'
            f'{smp}{virtio}, {record["guest"]}')


def methods(r):
    """One Linux guest, restored in every way"""
    lines = []
    for engine in NAMES:
        record = r.linux(engine) or r.floor(engine, 10)
        if record:
            us = record['us']
            lines.append([NAMES[engine], number(record.get('save_us')),
                          number(us['median']),
                          number(us['p99']), number(us['p999']),
                          record['n'], thousands(record['per_second'])
                          if record['guest'] else '-'])
    return ('One restore of a Linux guest, TCG, q35 256M, 10 pages, in µs; '
            'restores/s with the guest\'s own work',
            ['', 'save', 'median', 'p99', 'p999', 'of', 'restores/s'], lines)


def restores(r, pages=None):
    """All that our engine was measured with, or with that many pages"""
    lines = []
    for record in r.records:
        if 'phases_us' not in record or pages not in (None, record['pages']):
            continue
        us, phases = record['us'], record['phases_us']
        lines.append([name_of(record), record['engine'], record['pages'],
                      *(number(us[p]) for p in ('median', 'p99', 'p999')),
                      *(number(phases[p]) for p in PHASES), record['n'],
                      thousands(record['per_second']) or '-'])
    return ('Restores by the snapshot device, in µs; phases are medians',
            ['', 'ram', 'pages', 'median', 'p99', 'p999', *PHASES, 'of',
             'per s'], lines)


def floors(r):
    lines = [[NAMES[f['engine']], f['pages'],
              *(number(f['us'][p]) for p in ('median', 'p99', 'p999')),
              f['n']]
             for f in r.all(guest=None)]
    return ('The least that it can cost, in µs',
            ['', 'pages', 'median', 'p99', 'p999', 'of'], lines)


def fits(r):
    """The cost model"""
    lines = []
    sweeps = {(x['guest'], x['machine'], x['accel'], x['engine'], x['ram'],
               x['smp'], x['virtio']) for x in r.records}
    for sweep in sorted(sweeps, key=str):
        wanted = dict(zip(('guest', 'machine', 'accel', 'engine', 'ram',
                           'smp', 'virtio'), sweep))
        records = r.pages(**wanted)
        what = (name_of(records[0]), NAMES[records[0]['engine']])
        costs = [('restore', lambda x: x['us']['median'])]
        if 'phases_us' in records[0]:
            costs += [('its RAM phase', lambda x: x['phases_us']['ram']),
                      ('with the guest\'s work',
                       lambda x: 1e6 / (x['per_second'] or float('inf')))]
        for part, cost in costs:
            # From the pages on which there is something to copy
            points = [(x['pages'], cost(x)) for x in records if x['pages']]
            line = fit_line(points) if len(points) > 2 else None
            if line:
                lines.append([*what, part, number(line[0]),
                              f'{line[1]:.3f}', len(points)])
    return ('Cost = fixed + pages × each, in µs, by least squares of the '
            'relative errors',
            ['', '', '', 'fixed', 'each page', 'points'], lines)


def machines(r):
    lines = []
    for m in r.machines.values():
        if 'why' in m:
            continue
        lines.append([m['name'], m['against'], m['guest'],
                      thousands(m['per_second']), times(m['rate_ratio']),
                      times(m['wall_ratio']), times(m['cpu_ratio']),
                      number(m['us']),
                      number(m['p99_us']), times(m['us_ratio']), m['way'],
                      m['n']])
    return ('Machines in turns with a plain one: restores a second with the '
            "guest's work, without the time for which the host had no "
            'processor for them; by the clock; by processor time; the '
            'restore alone, in µs. ×: of the plain one, medians over the '
            'rounds',
            ['', 'against', 'guest', 'per s', '×', 'clock ×', 'CPU ×',
             'median', 'p99', '×', '', 'of'], lines)


def calls(r):
    lines = []
    for c in r.calls:
        if 'why' in c:
            continue
        by_name = sorted(c['calls'].items(), key=lambda item: -item[1])
        lines.append([c['name'], c['binary'], c['n'], f'{c["total"]:.2f}',
                      ', '.join(f'{name} {n:.2f}' for name, n in by_name)
                      or '-'])
    return ('System calls for each restore and its run, by strace',
            ['', 'binary', 'restores', 'calls', 'by name'], lines)


def each_device(r):
    """Of all that were measured, the dearest first"""
    found = sorted(devices.measured(r), key=lambda d: -d['added_us'])
    return ('What an idle device adds to a restore of the bare guest, in µs',
            ['', 'added', 'added p99', 'restore', '', 'of'],
            [[d['name'], f'{d["added_us"]:.2f}', f'{d["added_p99_us"]:.2f}',
              number(d['us']), d['way'], d['n']] for d in found])


def busy(r):
    lines = [[d['name'], f'{d["added_us"]:.2f}', number(d['us']),
              number(d['p99_us']), d['way'], d['n']] for d in r.busy]
    return ('What a device that worked since the save adds to a restore of a '
            'Linux guest, in µs',
            ['', 'added', 'restore', 'p99', '', 'of'], lines)


def disks(r):
    return ('What a restore takes for a disk, after clusters of 4 KiB were '
            'written in a row, in µs',
            ['clusters', 'median', 'p99', 'p999', 'each', 'of'],
            [[n, *(number(d['us'][p]) for p in ('median', 'p99', 'p999')),
              f'{d["us"]["median"] / n:.3f}' if n else '-', d['n']]
             for n, d in sorted(r.disks.items())])


def in_flight(r):
    return (f'With {REQUESTS} requests in flight, what is left of a restore when '
            "the last of them is done; and of QEMU's own stop, which waits for "
            'them as well, with the rest of a restore; in µs',
            ['', 'median', 'p99', 'of'],
            [[way, number(x['us']['median']), number(x['us']['p99']), x['n']]
             for way, x in r.in_flight.items()])


def back(r):
    return (f'Ways back, after {BACK} clusters of a disk of qcow2 were '
            'written, as the host sees them by QMP, in µs; of 32 MiB of RAM',
            ['', 'puts back', 'median', 'ratio', 'of'],
            [[x['way'], WAYS_BACK[x['way']], number(x['us']['median']),
              times(x['ratio']), x['n']] for x in r.back])


def throughput(r):
    return ("A guest's requests to a disk, 32 at once, by fio; beside the image "
            'itself',
            ['', 'way', 'rate', 'ratio'],
            [[t['pattern'], t['way'],
              f'{thousands(t["rate"])} {t["unit"]}', times(t['ratio'])]
             for t in r.throughput])


def loop(r):
    lines = []
    for x in r.loop:
        if 'why' in x:
            continue
        shares = ['-', '-', '-', number(x.get('engine_us'))]
        if 'us' in x:
            restore = x.get('restore_us')
            shares[:3] = [number(x['guest_us']), number(restore) or '-',
                          number(x['us'] - x['guest_us'] - restore)
                          if restore else '-']
        lines.append([f'{x["guest"]}: {x["way"]}', thousands(x['per_second']),
                      times(x.get('ratio')) or '-', *shares])
    return ('The fuzzing loop, on one CPU, in runs a second; where a run has '
            'its time, in µs. Figures that others publish are of KVM and of '
            'other hosts.',
            ['', 'runs', 'of restores', 'guest', 'restore', 'hand-off',
             'engine'], lines)


def say_file(x):
    """What was measured of a slot in a file, in a few words"""
    if 'rate' in x:
        stood = f', stood {x["stood_ms"]:.0f} ms' if 'stood_ms' in x else ''
        return f'{x["way"]}: {x["rate"] / 1e9:.2f} GB/s{stood}'
    if 'ms' in x:
        return f'{x["way"]}: {x["ms"]:.0f} ms'
    return (f'{x["pss_mib"]:.1f} MiB each, {x["pss_most_mib"]:.1f} at most; '
            f'all started in {x["start_ms"]:.0f} ms')


def files(r):
    return ('Slots in files: to write one, of a machine with RAM that is not '
            'zero, brought to the disk; to start from one, until the guest '
            'runs; and what many that share one take',
            ['', 'way', 'measured', 'ratio'],
            [[x['name'], x['way'], say_file(x).split(': ', 1)[-1],
              times(x.get('ratio') or x.get('rate_ratio')) or '-']
             for x in r.files if 'why' not in x])


def host_lines(results):
    host = results['host']
    before, after = (', '.join(map(str, host[name]))
                     for name in ('load_before', 'load_after'))
    yield (f'{host["qemu"]}, commit {host["commit"]}; {host["cpu"]}, '
           f'{host["cpus"]} CPUs, Linux {host["kernel"]}. All machines '
           'but the default ones have -nodefaults and -rtc clock=vm.')
    yield (f'{results["mode"].capitalize()} run of '
           f'{results["seconds"] / 60:.1f} minutes, {results["date"]}; load '
           f'average before: {before}, after: {after}.')
    yield from filter(None, [busy_host(results).strip()])


def busy_host(results):
    return (' The host was busy with something else: times are too long, '
            'rates too low.'
            if results['host']['load_before'][0] > 1 else '')


def text(results):
    r = Records(results)
    for title, head, lines in (restores(r), floors(r), fits(r), methods(r),
                               machines(r), calls(r), disks(r), in_flight(r),
                               back(r), throughput(r), loop(r), files(r),
                               each_device(r), busy(r), goals(r)):
        if not lines:
            continue
        yield ''
        yield title
        yield ''
        yield from table(head, lines, left=3 if title[:4] == 'Cost' else 1)
    yield ''
    skipped = results['skipped'] + [
        [x.get('name') or f'{x["guest"]}, {x["way"]}', x['why']]
        for kind in ('machines', 'calls', 'loop', 'files')
        for x in results.get(kind, []) if 'why' in x]
    for what, why in skipped:
        yield f'Not measured: {what}: {why}'
    for error in results['errors']:
        yield f'FAILED: {error}'
    yield from host_lines(results)


def rst(results):
    """A file for documentation to include; so it has no headings"""
    r = Records(results)
    yield '..'
    yield '   SPDX-License-Identifier: GPL-2.0-or-later'
    yield '   Written by scripts/bench --docs; do not edit.'
    yield ''
    yield from textwrap.wrap(' '.join(host_lines(results)), 79)
    yield ''
    yield '.. image:: snapshot-bench.svg'
    yield '   :alt: time of a restore by the number of pages written to'
    yield ''
    for title, head, lines in (methods(r), restores(r, 10), fits(r),
                               machines(r), calls(r), disks(r), in_flight(r),
                               back(r), throughput(r), loop(r), files(r),
                               busy(r)):
        if not lines:
            continue
        yield from textwrap.wrap(f'{title}:', 79)
        yield ''
        yield from rst_table(head, lines)


def costs(results):
    """What each device costs, for the manual"""
    r = Records(results)
    found = devices.measured(r)
    yield '..'
    yield '   SPDX-License-Identifier: GPL-2.0-or-later'
    yield '   Written by scripts/bench --docs; do not edit.'
    yield ''
    least = min(d['n'] for d in found)
    yield from textwrap.wrap(
        f'Of {len(found)} devices, these add more than {devices.CHEAP} µs, or '
        'need a reset. Medians and 99th percentiles of '
        f'{least} restores or more, by turns with the machine without the '
        f'device, which needed {number(baseline(found))} µs. '
        f'({results["host"]["cpu"]}, {results["date"][:10]}, commit '
        f'{results["host"]["commit"]}.)' + busy_host(results) +
        (' The run did not come to its end: there are more devices.'
         if results['errors'] else ''), 79)
    yield ''
    yield from rst_table(
        ['Device', 'Adds, median', 'Adds, 99th percentile', 'How', 'Why'],
        [[d['name'], f'{number(d["added_us"])} µs',
          f'{number(d["added_p99_us"])} µs', d['way'], d['reason'] or '-']
         for d in devices.dear(r)] or [['none', '-', '-', '-', '-']])
    yield from textwrap.wrap(
        'All others are put back in place, and add these microseconds:', 79)
    yield ''
    for category, names in devices.cheap(r):
        yield category
        yield from textwrap.wrap(', '.join(names), 79, initial_indent='  ',
                                 subsequent_indent='  ',
                                 break_on_hyphens=False)
        yield ''


def baseline(found):
    """The median restore without the devices"""
    return stats.median([d['us'] - d['added_us'] for d in found])

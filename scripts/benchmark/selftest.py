# SPDX-License-Identifier: GPL-2.0-or-later
"""That bench works, of which "make check" runs the little that is quick"""

import contextlib
import io
import json

import check
from disks import IN_FLIGHT_WAYS, WAYS_BACK
from goals import MACHINES, Records, rows
import loop
from report import NAMES
import report
from shapes import CALLS, SELF_TEST_DEVICES


def passes(results, reference, spoil=None):
    with contextlib.redirect_stdout(io.StringIO()):
        return check.check(results, reference, spoil)


def without(results):
    """(name, results) that lack the rows of one machine, or of the devices"""
    for m in results['machines']:
        if 'why' not in m:
            yield m['name'], {**results, 'machines': [
                x for x in results['machines'] if x is not m]}
    for kind in 'devices', 'busy', 'disks', 'throughput':
        yield kind, {**results, kind: []}


def tests(results, made, file):
    """(name, is it so) of each test of a run's outcome"""
    read = json.loads(file.read_text())
    records = read['records']
    engines = {r['engine'] for r in records}
    reference = check.make_reference(results, {})

    yield 'every step went well', not read['errors']
    yield 'each way to restore was measured', \
        engines == set(NAMES)
    yield 'each record has its figures', \
        all(r['us']['median'] > 0 and r['n'] > 0 for r in records)
    yield 'phases add up to no more than it took', \
        all(sum(r['phases_p10_us'].values()) <= max(2 * r['us']['median'], 20)
            for r in records if 'phases_us' in r)
    yield 'each goal has a row', len(rows(Records(read))) >= 30
    for name, what, _ in MACHINES:
        yield f'{what}: measured, or why not', \
            any(m['name'] == name and m.get('why', m.get('n', 0) > 0)
                for m in read['machines'])
    yield 'it is as fast as itself', \
        0.3 < Records(read).machine('now')[0].get('us_ratio', 0) < 3
    yield 'devices were measured', \
        len(read['devices']) == len(SELF_TEST_DEVICES)
    for shape in CALLS:
        yield f'system calls, {shape}: counted, or why not', \
            any(c['name'] == shape.name and c.get('why', c.get('n', 0) > 0)
                for c in read['calls'])
    yield 'calls are seen where there must be some', \
        any(sum(c['calls'].values()) > 1 for c in read['calls']
            if c['name'] == CALLS[-1].name)
    yield 'disks were put back', len(read['disks']) >= 3 and \
        all(d['us']['median'] > 0 for d in read['disks'])
    yield 'restores with requests in flight were measured', \
        [x['way'] for x in read['in_flight']] == list(IN_FLIGHT_WAYS) and \
        all(x['n'] > 0 and x['us']['median'] > 0 for x in read['in_flight'])
    yield 'ways back were measured', \
        [x['way'] for x in read['back']] == list(WAYS_BACK) and \
        all(x['n'] > 0 for x in read['back'])
    yield 'throughput was measured', len(read['throughput']) == 12 and \
        all(t['rate'] > 0 for t in read['throughput'])
    yield 'the fuzzing loop was measured', \
        {loop.TOY, loop.COUNTS, loop.COUNTED, loop.DEMO} == \
        {x['guest'] for x in read['loop']} and \
        read['loop'][0]['ratio'] > 0
    yield 'files were written, and machines started from them', \
        {'rate', 'ms', 'pss_mib'} <= {key for x in read['files'] for key in x}
    yield 'there is a table of the devices', \
        all(any(name in line for line in report.costs(read))
            for name in SELF_TEST_DEVICES)
    yield 'there are plots', \
        {'methods.png', 'methods.svg', 'phases.png', 'phases.svg'} <= set(made)
    yield 'there is a table for the documentation', \
        any('list-table' in line for line in report.rst(read))
    yield 'what is as it was passes the check', \
        check.check(results, reference)
    for name in reference['ratios']:
        yield f'spoiled, it fails: {name}', \
            not passes(results, reference, name)
    for name, less in without(results):
        yield f'without it, it fails: {name}', not passes(less, reference)


def tap(results, made, file):
    """The lines of the Test Anything Protocol"""
    count = 0
    for count, (name, good) in enumerate(tests(results, made, file), 1):
        yield f'{"ok" if good else "not ok"} {count} - {name}'
    yield f'1..{count}'

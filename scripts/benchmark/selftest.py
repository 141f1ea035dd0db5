# SPDX-License-Identifier: GPL-2.0-or-later
"""That bench works, of which "make check" runs the little that is quick"""

import json

import check
from goals import Records, rows
from report import NAMES
import report


def tests(results, made, file):
    """(name, is it so) of each test of a run's outcome"""
    read = json.loads(file.read_text())
    records = read['records']
    engines = {r['engine'] for r in records}
    reference = check.make_reference(results, {})
    first = next(iter(reference['ratios']))

    yield 'every step went well', not read['errors']
    yield 'each way to restore was measured', \
        engines == set(NAMES)
    yield 'each record has its figures', \
        all(r['us']['median'] > 0 and r['n'] > 0 for r in records)
    yield 'phases add up to no more than it took', \
        all(sum(r['phases_p10_us'].values()) <= max(2 * r['us']['median'], 20)
            for r in records if 'phases_us' in r)
    yield 'each goal has a row', len(rows(Records(read))) >= 20
    yield 'there are plots', \
        {'methods.png', 'methods.svg', 'phases.png', 'phases.svg'} <= set(made)
    yield 'there is a table for the documentation', \
        any('list-table' in line for line in report.rst(read))
    yield 'what is as it was passes the check', \
        check.check(results, reference)
    yield 'a ratio that was spoiled fails it', \
        not check.check(results, reference, first)


def tap(results, made, file):
    """The lines of the Test Anything Protocol"""
    count = 0
    for count, (name, good) in enumerate(tests(results, made, file), 1):
        yield f'{"ok" if good else "not ok"} {count} - {name}'
    yield f'1..{count}'

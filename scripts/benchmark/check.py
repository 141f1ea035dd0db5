# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare a run's ratios with those of reference.json"""

import json
from pathlib import Path

from goals import Records, ratios
from machine import BenchError

REFERENCE = Path(__file__).parent / 'reference.json'

# How many times worse a ratio may be. Both of its halves are from one run, but
# on a host that does something else the one suffers more than the other.
TOLERANCE = 2


def load():
    try:
        return json.loads(REFERENCE.read_text())
    except FileNotFoundError:
        raise BenchError(f'there is no {REFERENCE}: make one with '
                         'scripts/bench --update-reference')


def check(results, reference, spoil=None):
    """
    Prints a line for each ratio; returns if all is well. @spoil, a part of
    names, makes these ratios ten times worse: does it fail then?
    """
    default = reference['tolerance']
    want = dict(reference['ratios'])
    # Another run may measure less, and say so, but not by accident
    less = 'not asked for' if results.get('only') else \
        f'a {results["mode"]} run' if results['mode'] != reference['mode'] \
        else None
    good = True

    print('\nRatios, against scripts/benchmark/reference.json '
          f'({reference["commit"]})\n')
    print(f'{"":44} {"reference":>10} {"now":>10}')
    for ratio in ratios(Records(results)):
        value = ratio.value
        if value is None:
            if ratio.name in want:
                why = ratio.why or less
                good = good and bool(why)
                known = want.pop(ratio.name)
                print(f'{ratio.name:44} {known["value"]:10.3g} {"-":>10}  '
                      f'{"" if why else "FAIL: "}not measured'
                      f'{": " + why if why else ""}')
            continue
        if spoil is not None and spoil in ratio.name:
            value *= 0.1 if ratio.higher else 10
        known = want.pop(ratio.name, None)
        if known is None:
            print(f'{ratio.name:44} {"none":>10} {value:10.3g}  new')
            continue
        tolerance = known.get('tolerance', default)
        worse = known['value'] / value if ratio.higher \
            else value / known['value']
        if worse > tolerance:
            verdict = f'FAIL: {worse:.1f} times worse, {tolerance:g} allowed'
            good = False
        elif worse < 1 / tolerance:
            verdict = 'ok, much better: time for --update-reference'
        else:
            verdict = 'ok'
        print(f'{ratio.name:44} {known["value"]:10.3g} {value:10.3g}  '
              f'{verdict}')
    for name, known in want.items():
        good = False
        print(f'{name:44} {known["value"]:10.3g} {"-":>10}  '
              'FAIL: there is no such ratio')
    if spoil is not None:
        print(f'\n(those with "{spoil}" in their name made 10 times worse)')
    return good


def make_reference(results, old):
    """@old: the ratios so far. What somebody chose as tolerance stays."""
    new = dict(old) if results.get('only') else {}
    for ratio in ratios(Records(results)):
        if ratio.value is None:
            # It may be there on another host
            if ratio.why and ratio.name in old:
                new[ratio.name] = old[ratio.name]
            continue
        new[ratio.name] = {**old.get(ratio.name, {}),
                           'value': float(f'{ratio.value:.3g}')}
    return {
        'SPDX-License-Identifier': 'GPL-2.0-or-later',
        'about': 'Written by scripts/bench --update-reference. A ratio may be '
                 'so many times worse (tolerance; its own, if it has one) '
                 'before scripts/bench --check fails.',
        'commit': results['host']['commit'],
        'mode': results['mode'],
        'tolerance': TOLERANCE,
        'ratios': new,
    }


def update(results):
    old = load()['ratios'] if REFERENCE.exists() else {}
    REFERENCE.write_text(json.dumps(make_reference(results, old),
                                    indent=4) + '\n')
    print(f'wrote {REFERENCE}')

# SPDX-License-Identifier: GPL-2.0-or-later
"""
What each device costs: which there are, and the manual's table of it.

What a device needs to start is known to the test snapshot-any-test, which
tells QEMU's arguments for each.
"""

import json
import os
from pathlib import Path
import re
import subprocess

from machine import BenchError
from shapes import Shape
import stats

CHEAP = 3               # microseconds: told in a list, not in a row


def program(qemu):
    """Beside QEMU, where "make build" leaves it"""
    return Path(os.path.realpath(qemu)).parent / 'tests' / 'qtest' / \
        'snapshot-any-test'


def missing(qemu):
    """Why the devices cannot be found, or None"""
    if not os.access(program(qemu), os.X_OK):
        return f'there is no {program(qemu)}'
    return None


def ask(qemu, *paths):
    """
    The arguments of each device that starts, and the names of those that do
    not, among the tests that begin with one of @paths
    """
    env = os.environ | {'QTEST_QEMU_BINARY': os.path.realpath(qemu),
                        'SNAPSHOT_ANY_INPUTS': '0', 'SNAPSHOT_ANY_VARIANT': '0'}
    done = subprocess.run(
        [program(qemu), '--tap', '-k',
         *(word for path in paths for word in ('-p', path))],
        env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, check=False)
    started = re.findall(r'^# starts: (.* -device ([^, ]+),id=dut(?:,\S*)?) '
                         r'-device snapshot,', done.stdout, re.M)
    skipped = re.findall(r'^ok \d+ \S*/(\S+) # SKIP', done.stdout, re.M)
    if not started and not skipped:
        raise BenchError(f'{program(qemu)} found no device:\n'
                         f'{done.stdout[-500:]}')
    return {name: args for args, name in started}, skipped


def find(qemu, cache):
    """As ask(), of pc, and of q35 where pc has no place for it"""
    key = [f'{path} {os.stat(path).st_mtime_ns}' for path in
           (os.path.realpath(qemu), program(qemu))]
    try:
        known = json.loads(cache.read_text())
        if known['key'] == key:
            return known['devices']
    except (FileNotFoundError, ValueError, KeyError):
        pass
    print('Asking for the devices, and what each needs; that takes a minute '
          'or two, once for each build', flush=True)
    tests = '/x86_64/snapshot/any'
    found, skipped = ask(qemu, f'{tests}/pc/dirty')
    found |= ask(qemu, *(f'{tests}/q35/dirty/{name}' for name in skipped))[0]
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({'key': key, 'devices': found}, indent=1))
    return found


def shapes(qemu, cache, wanted=None):
    """
    Pairs of a machine with the device, and without it, but with what it needs,
    so that neighbours have the latter in common. A CPU is no device here: the
    goals have rows of several.
    """
    pairs = []
    for name, args in find(qemu, cache).items():
        if name.endswith('-cpu') or (wanted and name not in wanted):
            continue
        machine = re.match('-M ([^ ]+)', args)[1]
        args = re.sub('^.*?-nodefaults ', '', args)
        args = re.sub('-m [^, ]+', '-m 128M', args)
        # What others may write to is compared at each restore, byte by byte.
        if not name.startswith('ivshmem'):
            args = args.replace(',share=on', '')
        # As the test starts it, too
        args = '-nodefaults -audio none ' + ' '.join(args.split())
        without = re.sub(r' -device [^, ]+,id=dut(,\S*)?$', '', args)
        pairs.append((Shape(name, machine, args, 'bare'),
                      Shape(f'{machine} {without}', machine, without, 'bare')))
    return sorted(pairs, key=lambda pair: (pair[1].name, pair[0].name))


def categories(qemu):
    """What QEMU's help has each device under"""
    text = subprocess.run([qemu, '-device', 'help'], check=True, text=True,
                          stdout=subprocess.PIPE).stdout
    found, category = {}, None
    for line in text.split('\n'):
        if line.endswith(' devices:'):
            category = line.removesuffix(' devices:')
        elif m := re.match('name "([^"]+)"', line):
            found[m[1]] = category
    return found


# The table

def measured(r):
    return [d for d in r.devices if 'why' not in d]


def nine_of_ten(r):
    """The time that no more than one in ten devices exceeds"""
    added = sorted(d['added_us'] for d in measured(r))
    return stats.percentile(added, 0.9) if added else None


def dearest(records):
    return max(records, key=lambda d: d['added_us'], default=None)


def is_cheap(device):
    return device['added_us'] <= CHEAP and device['way'] == 'in place'


def dear(r):
    """Those that are told in a row, the dearest first"""
    return sorted((d for d in measured(r) if not is_cheap(d)),
                  key=lambda d: -d['added_us'])


def cheap(r):
    """Names, by category, with what each adds"""
    found = {}
    for d in sorted(filter(is_cheap, measured(r)), key=lambda d: d['name']):
        found.setdefault(d.get('category') or 'Other', []).append(
            f'{d["name"]}\u00a0{max(d["added_us"], 0):.1f}')
    return sorted(found.items())

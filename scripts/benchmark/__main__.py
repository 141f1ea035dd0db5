# SPDX-License-Identifier: GPL-2.0-or-later
"""How long restores take, beside every other way to restore a machine"""

import argparse
import contextlib
import datetime
import json
import os
from pathlib import Path
import platform
import signal
import subprocess
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests' / 'functional'))

from snapshot import build_guest        # noqa: E402

import check                            # noqa: E402
from machine import BenchError          # noqa: E402
from measure import Bench               # noqa: E402
from plan import EFFORTS, Plan          # noqa: E402
import plot                             # noqa: E402
import report                           # noqa: E402
import selftest                         # noqa: E402

RESULTS = ROOT / 'build' / 'bench' / 'results.json'
DOCS = ROOT / 'docs' / 'devel' / 'snapshot-bench.rst.inc'
FIGURE = DOCS.with_name('snapshot-bench.svg')
COSTS = ROOT / 'docs' / 'system' / 'devices' / 'snapshot-costs.rst.inc'

# Lists of the results beside "records", each of which a record names
KINDS = 'machines', 'devices', 'busy', 'calls', 'disks', \
    'in_flight', 'back', 'throughput', 'loop', 'files'


def command_output(*command):
    try:
        return subprocess.run(command, check=True, text=True, cwd=ROOT,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def describe_host(qemu):
    with open('/proc/cpuinfo', encoding='ascii', errors='replace') as f:
        models = [line.split(':')[1].strip() for line in f
                  if line.startswith('model name')]
    dirty = '-dirty' if command_output('git', 'status', '--porcelain',
                                       '-uno') else ''
    return {
        'cpu': models[0] if models else platform.machine(),
        'cpus': len(os.sched_getaffinity(0)),
        'kernel': platform.release(),
        'qemu': command_output(qemu, '--version').split('\n')[0],
        'commit': (command_output('git', 'rev-parse', '--short=12', 'HEAD') or
                   'unknown') + dirty,
        'python': platform.python_version(),
        'gnuplot': command_output('gnuplot', '--version'),
        'load_before': [round(x, 1) for x in os.getloadavg()],
    }


def compile_guests(bench):
    try:
        build_guest(bench.image)
        subprocess.run(['gcc', '-O2', '-Wall', '-Wextra', '-o',
                        bench.floor_program, Path(__file__).parent /
                        'floor.c'], check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        said = getattr(e, 'stdout', None) or e
        raise BenchError(f'cannot compile: {said}\n'
                         'run: apt-get install gcc libc6-dev')


def minutes(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'


def say_record(record):
    if 'why' in record:
        return f'not measured: {record["why"]}'
    if record.get('what') == 'calls':
        return f'{record["total"]:.2f} for each restore'
    if record.get('what') == 'throughput':
        return (f'{record["way"]}: {report.thousands(record["rate"])} '
                f'{record["unit"]}')
    if record.get('what') == 'loop':
        return f'{record["way"]}: {report.thousands(record["per_second"])}/s'
    if record.get('what') == 'files':
        return report.say_file(record)
    if record.get('what') == 'back':
        return f'{record["way"]}: {report.number(record["us"]["median"])} us'
    if record.get('what') in ('disks', 'in_flight'):
        return f'{report.number(record["us"]["median"])} us'
    if record.get('what') in ('devices', 'busy'):
        return f'{record["added_us"]:+.2f} us, {record["way"]}'
    if record.get('what') == 'machines':
        return (f'{report.thousands(record["per_second"])}/s, '
                f'{record["rate_ratio"]:.3g} times, {record["way"]}')
    us = record['us']
    per_second = report.thousands(record['per_second'])
    return (f'{report.number(us["median"])} us' +
            (f', {per_second or "?"}/s' if 'phases_us' in record else ''))


def run_steps(steps):
    """
    The records and the errors. A step that fails does not end the rest, and
    Ctrl-C leaves what was measured so far.
    """
    records, errors = [], []
    start = time.monotonic()
    estimated, total = 0, sum(step.seconds for step in steps)
    for i, step in enumerate(steps, 1):
        # How wrong estimates were so far says how wrong they will be
        spent = time.monotonic() - start
        slow = spent / estimated if estimated > total / 20 else 1
        print(f'[{i:3}/{len(steps)}] '
              f'{minutes((total - estimated) * slow):>5} left  '
              f'{step.title:58}', end=' ', flush=True)
        try:
            new = step.run()
            records += new
            print('; '.join(map(say_record, new[:4])) +
                  (' ...' if len(new) > 4 else ''), flush=True)
        except (BenchError, subprocess.CalledProcessError) as e:
            errors.append(f'{step.title}: {e}')
            print(f'FAILED: {e}', flush=True)
        except KeyboardInterrupt:
            if not records:
                raise
            errors.append(f'interrupted; of {len(steps)} measurements, '
                          f'{i - 1} were made')
            print('interrupted')
            break
        estimated += step.seconds
    return records, errors


def measure(args):
    if not os.access(args.qemu, os.X_OK):
        raise BenchError(f'{args.qemu} is not there; run: make build')
    if not (args.linux / 'initramfs').exists():
        raise BenchError(f'there is no Linux guest in {args.linux}; run: '
                         'scripts/linux-guest')
    host = describe_host(args.qemu)
    start = time.monotonic()
    date = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
    with tempfile.TemporaryDirectory(prefix='snapshot-bench-') as directory:
        bench = Bench(args.qemu, args.before, args.linux, directory,
                      EFFORTS[args.mode])
        compile_guests(bench)
        plan = Plan(bench, args.mode, RESULTS.with_name('devices.json'),
                    args.only)
        for what, why in plan.skipped:
            print(f'Not measured: {what}: {why}')
        with contextlib.closing(plan.track):
            records, errors = run_steps(plan.steps)
    host['load_after'] = [round(x, 1) for x in os.getloadavg()]
    results = {
        'mode': args.mode,
        'date': date,
        'seconds': round(time.monotonic() - start),
        'host': host,
        'skipped': plan.skipped,
        'only': args.only,
        'errors': errors,
        'records': [r for r in records if 'what' not in r],
        **{kind: [r for r in records if r.get('what') == kind]
           for kind in KINDS},
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + '\n')
    return results


def parse_args():
    parser = argparse.ArgumentParser(
        prog='bench', description=__doc__,
        epilog='Writes build/bench/results.json and plots beside it.')
    parser.set_defaults(mode='full')
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument('--quick', action='store_const', dest='mode',
                      const='quick', help='most of what the goals need, in 6 '
                      'minutes')
    mode.add_argument('--self-test', action='store_const', dest='mode',
                      const='self-test', help='does it work? speaks TAP, as '
                      'a test does')
    mode.add_argument('--again', action='store_true',
                      help='measure nothing, take results.json as it is')
    parser.add_argument('--before', metavar='QEMU', help='an older binary, '
                        'to measure this one against')
    parser.add_argument('--only', metavar='TEXT', action='append',
                        help='measure only what has TEXT in its title')
    parser.add_argument('--check', action='store_true',
                        help='fail if a ratio is much worse than in '
                             'scripts/benchmark/reference.json')
    parser.add_argument('--spoil', metavar='NAME',
                        help='with --check: make ratios with NAME in their '
                             'name worse, to see it fail')
    parser.add_argument('--update-reference', action='store_true',
                        help='make the ratios of this run the reference')
    parser.add_argument('--docs', action='store_true',
                        help=f'write {DOCS.relative_to(ROOT)} and its figure, '
                             f'and {COSTS.relative_to(ROOT)}')
    parser.add_argument('--results', type=Path, metavar='FILE',
                        help='instead of build/bench/results.json; plots lie '
                             'beside it')
    parser.add_argument('--qemu', help=argparse.SUPPRESS, default=os.getenv(
        'QEMU', ROOT / 'build' / 'qemu-system-x86_64'))
    parser.add_argument('--linux', help=argparse.SUPPRESS, type=Path,
                        default=ROOT / 'build' / 'linux')
    args = parser.parse_args()
    args.qemu = os.path.abspath(args.qemu)
    if args.mode == 'self-test' and not args.before:
        args.before = args.qemu
    args.before = args.before and os.path.abspath(args.before)
    if not args.results:
        args.results = ROOT / 'build' / 'check' / 'bench' / 'results.json' \
            if args.mode == 'self-test' else RESULTS
    return args


def run(args):
    """Returns if all went well"""
    if args.check:
        check.load()    # say now that there is none, not after the run
    if args.again:
        try:
            results = json.loads(args.results.read_text())
        except FileNotFoundError:
            raise BenchError(f'there is no {args.results}: run make bench')
    else:
        results = measure(args)
    print('\n'.join(report.text(results)))

    made = plot.plots(results, args.results.parent)
    print(f'\n{args.results} and, beside it, {", ".join(made)}')
    good = not results['errors']
    if args.docs and results['devices']:
        COSTS.write_text('\n'.join(report.costs(results)))
        print(f'wrote {COSTS}')
    if args.docs and results['records']:
        DOCS.write_text('\n'.join(report.rst(results)))
        declaration, *figure = [
            line.rstrip() for line in
            (args.results.parent / 'pages.svg').read_text().splitlines()]
        FIGURE.write_text('\n'.join([
            declaration, '<!--', '  SPDX-License-Identifier: GPL-2.0-or-later',
            '-->', *figure, '']))
        print(f'wrote {DOCS} and {FIGURE}')
    if args.update_reference:
        check.update(results)
    if args.check or args.spoil is not None:
        good = check.check(results, check.load(), args.spoil) and good
    return good


def self_test(args):
    """What bench says goes to standard error, where a test's log is."""
    with contextlib.redirect_stdout(sys.stderr):
        results = measure(args)
        made = plot.plots(results, args.results.parent)
        lines = list(selftest.tap(results, made, args.results))
    print('\n'.join(lines))
    return not any(line.startswith('not ok') for line in lines)


if __name__ == '__main__':
    try:
        arguments = parse_args()
        # So that QEMUs are ended, and files removed
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        main = self_test if arguments.mode == 'self-test' else run
        sys.exit(0 if main(arguments) else 1)
    except BenchError as e:
        sys.exit(f'bench: {e}')
    except KeyboardInterrupt:
        sys.exit(130)

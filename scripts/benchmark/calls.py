# SPDX-License-Identifier: GPL-2.0-or-later
"""How many system calls a restore takes, by their names: strace counts them"""

import dataclasses
import re
import shutil
import signal
import subprocess
import tempfile
import time

from machine import BenchError
from shapes import missing
from turns import Racer, refusal, WINDOW

# A call in so many restores is not told
RARE = 0.01

LINE = re.compile(r'^ *[\d.]+ +[\d.]+ +\d+ +(\d+)(?: +\d+)? +(\w+)$', re.M)


def parse(text):
    """The calls of each name that a table of "strace -c" has"""
    return {name: int(n) for n, name in LINE.findall(text) if name != 'total'}


def count(racer, seconds):
    """(restores, calls by name) of so many @seconds"""
    # A question costs a hundred calls, as QEMU reads it byte by byte: ask while
    # nobody counts.
    before = racer.turn(1, 0.1)['restores']
    with tempfile.NamedTemporaryFile('r') as out:
        strace = subprocess.Popen(
            ['strace', '-f', '-c', '-o', out.name, '-p', str(racer.pid)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            said = strace.stderr.readline()
            if 'attached' not in said:
                raise BenchError(f'strace: {said.strip()}')
            racer.go_on()
            time.sleep(seconds)
            racer.wait()
        finally:
            strace.send_signal(signal.SIGINT)
            strace.communicate(timeout=60)
        counted = parse(out.read())
    racer.go_on()
    return racer.restores() - before, counted


def calls(bench, shape, before=False):
    """A list of one record"""
    shape = dataclasses.replace(shape, before=before)
    what = {'what': 'calls', 'name': shape.name,
            'binary': 'before' if before else 'now'}
    why = None if shutil.which('strace') else 'there is no strace'
    why = why or missing(shape, bench) or refusal(bench, shape)
    if why:
        return [{**what, 'why': why}]
    with Racer(bench, shape) as racer:
        racer.turn(WINDOW, 5 * bench.effort.turn_seconds)
        n, found = count(racer, bench.effort.calls_seconds)
    found = {name: c / n for name, c in found.items() if c / n >= RARE}
    return [{**what, 'n': n, 'calls': found, 'total': sum(found.values())}]

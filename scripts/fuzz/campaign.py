# SPDX-License-Identifier: GPL-2.0-or-later
"""
What scripts/fuzz-demo tells of a campaign of AFL++'s, and its picture

    campaign.py DIRECTORY NAME          NAME is squashfs or module
    campaign.py DIRECTORY NAME FILE     of one of its crashes

AFL++ 4.04c writes how far it has come once a minute only. But each file in its
queue has in its name when it was found, and in which run: what edges were known
at that time is what those files have, each run once more.
"""

import os
from pathlib import Path
import re
import sys

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / 'scripts' / 'benchmark'),
             str(ROOT / 'contrib' / 'snapshot' / 'host')]

from plot import COLOURS, data, draw  # noqa: E402

TITLES = {
    'squashfs': 'Linux {} mounts images of squashfs',
    'module': 'A module of Linux {} with a planted overflow of the heap',
}
KERNEL = {
    'squashfs': 'edges of the kernel',
    'module': 'edges of modules',
}
SLICES = 24                     # of the time, for runs a second
LINES = 22                      # of the console


def machine(path):
    os.environ['SNAPSHOT_HOST_LIBRARY'] = \
        str(path.parent / 'host' / 'libsnapshot-host.so')
    import snapshot_host
    return snapshot_host.Machine(path)


def statistics(campaign):
    lines = (campaign / 'default' / 'fuzzer_stats').read_text().splitlines()
    return {key.strip(): value.strip() for key, _, value in
            (line.partition(':') for line in lines)}


class Campaign:
    def __init__(self, directory, name):
        self.stats = statistics(directory / name)
        self.runs = int(self.stats['execs_done'])
        # [(seconds, runs so far, edges so far)]
        self.points = []
        known = set()
        files = sorted((directory / name / 'default' / 'queue').glob('id:*'))
        with machine(directory / f'{name}.vm') as vm:
            for file in files:
                coverage = vm.run(file.read_bytes()).coverage
                known |= {i for i, n in enumerate(coverage) if n}
                time = re.search(r',time:(\d+),', file.name)
                runs = re.search(r',execs:(\d+),', file.name)
                self.points.append((int(time[1]) / 1000 if time else 0,
                                    int(runs[1]) if runs else 0, len(known)))
        # AFL++ counts whole seconds, and ends with what it was looking for.
        crashes = (directory / name / 'default' / 'crashes').glob('id:*')
        times = [re.search(r',time:(\d+)', file.name) for file in crashes]
        self.seconds = max([float(self.stats['run_time']), self.points[-1][0],
                            0.1] + [int(t[1]) / 1000 for t in times if t])
        self.points.append((self.seconds, self.runs, len(known)))

    def at(self, time):
        """How many runs there were until then"""
        before = (0, 0, 0)
        for point in self.points:
            if point[0] >= time:
                span = point[0] - before[0]
                part = (time - before[0]) / span if span else 1
                return before[1] + part * (point[1] - before[1])
            before = point
        return self.runs

    def speeds(self):
        step = self.seconds / SLICES
        return [((i + 0.5) * step,
                 (self.at((i + 1) * step) - self.at(i * step)) / step)
                for i in range(SLICES)]

    def picture(self, title, label):
        edges = [(time, edges) for time, _, edges in self.points]
        return f'''
set title '{title}'
set xlabel 'seconds'
set ylabel '{label}' textcolor '{COLOURS[0]}'
set y2label 'runs a second' textcolor '{COLOURS[1]}'
set border 11 linecolor '#444444'
set y2tics
set y2range [0:*]
set key bottom right
''' + data('edges', edges) + data('speed', self.speeds()) + f'''
plot $edges with steps linewidth 3 linecolor '{COLOURS[0]}' title '{label}', \\
     $speed with lines linewidth 2 linecolor '{COLOURS[1]}' axes x1y2 \\
     title 'runs a second'
'''

    def tell(self, title, label):
        print(f'''
{title}:
    {self.seconds:.1f} s, {self.runs} runs, {self.runs / self.seconds:.0f} a \
second; stability {self.stats['stability']}
    {label}: {self.points[0][2]} with the first input, {self.points[-1][2]} at \
the end
    {self.stats.get('saved_crashes', self.stats.get('unique_crashes'))} \
crashes, {self.stats.get('saved_hangs', self.stats.get('unique_hangs'))} hangs''')


def tell_crash(directory, name, file):
    found = re.search(r'time:(\d+),execs:(\d+)', file)
    console = (directory / f'{name}.crash').read_text(errors='replace')
    lines = console.partition('console:\n')[2].splitlines()
    here = Path.cwd()

    def short(path):
        return os.path.relpath(path, here)

    if found:
        print(f'    found after {int(found[1]) / 1000:.1f} s, in run '
              f'{found[2]}; replayed, the kernel says:\n')
    for line in lines[:LINES]:
        print('    ' + line.rstrip())
    print(f'''    ... ({len(lines)} lines: {short(directory / f'{name}.crash')})

To look at that run, instruction by instruction, in gdb:

    {short(directory / 'host' / 'snapshot-vm')} replay \
{short(directory / f'{name}.vm')} \\
        {short(file)}
''')


def main():
    directory, what = Path(sys.argv[1]), sys.argv[2]
    if len(sys.argv) > 3:
        tell_crash(directory, what, sys.argv[3])
        return 0
    version = (directory.parent / 'linux' / 'version').read_text().strip()
    title = TITLES[what].format(version)
    campaign = Campaign(directory, what)
    campaign.tell(title, KERNEL[what])
    files = draw(directory / what, campaign.picture(title, KERNEL[what]))
    print('    picture: ' +
          ', '.join(os.path.relpath(file) for file in files))
    if campaign.points[-1][2] <= campaign.points[0][2]:
        print('fuzz-demo: no coverage but the first input\'s', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())

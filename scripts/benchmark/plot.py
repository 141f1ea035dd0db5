# SPDX-License-Identifier: GPL-2.0-or-later
"""Plots of a run, by gnuplot, each as SVG and as PNG"""

import subprocess

from goals import Records
from machine import BenchError, PHASES
from report import NAMES

# Colours that people with colour-blindness can tell apart (Okabe, Ito)
COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', \
    '#000000', '#999999'

COMMON = '''
set grid linecolor '#dddddd' linetype 1
set border 3 linecolor '#444444'
set tics nomirror
set key top left Left reverse samplen 2
'''


def quoted(text):
    return "'" + str(text).replace("'", "''") + "'"


def data(name, lines):
    """A block of data in gnuplot's own language"""
    rows = [' '.join(map(str, line)) for line in lines]
    return '\n'.join([f'${name} << EOD', *rows, 'EOD\n'])


def curves(series):
    """[(title, points)] as lines with points"""
    series = [(title, points) for title, points in series if len(points) > 1]
    if not series:
        return None
    blocks, parts = '', []
    for i, (title, points) in enumerate(series):
        blocks += data(f'd{i}', points)
        parts.append(f"$d{i} with linespoints linewidth 2 pointtype 7 "
                     f"pointsize 0.6 linecolor '{COLOURS[i % 8]}' "
                     f"title {quoted(title)}")
    return blocks + 'plot ' + ', \\\n     '.join(parts) + '\n'


# Each of the following returns the title and what gnuplot shall do, which is
# None where the run did not measure it

def pages(r):
    def sweep(engine, guest=None, machine=None, ram=128, accel=None):
        return [(x['pages'], x['us']['median']) for x in
                r.pages(engine=engine, guest=guest, machine=machine, ram=ram,
                        accel=accel, smp=1, virtio=False)
                if x['pages'] and x['us']['median']]

    script = curves(
        [(f'TCG bare, ram={engine}', sweep(engine, 'bare', 'pc', 128, 'tcg'))
         for engine in ('dirty', 'remap')] +
        [(f'TCG Linux, ram={engine}',
          sweep(engine, 'linux', 'q35', 256, 'tcg'))
         for engine in ('dirty', 'remap')] +
        [(NAMES[engine], sweep(engine)) for engine in ('memcpy', 'fork')] +
        [(f'KVM bare, ram={engine}', sweep(engine, 'bare', 'pc', 128, 'kvm'))
         for engine in ('dirty', 'remap')])
    return 'Cost of a restore by pages written to', script and f'''
set logscale xy
set format y "%g"
set xlabel 'pages written to since the save'
set ylabel 'median, µs'
set key below maxcols 3
{script}'''


def ram(r):
    script = curves([
        (NAMES[engine],
         sorted((x['ram'], x['us']['median']) for x in
                r.all(engine=engine, guest='bare', machine='pc', accel='tcg',
                      smp=1, virtio=False, pages=10)))
        for engine in ('dirty', 'remap')])
    return 'Cost of a restore by size of RAM (TCG, pc, bare, 10 pages)', \
        script and f'''
set logscale xy 2
set logscale y 10
set format y "%g"
set xtics (64, 128, 256, 512, '1G' 1024, '2G' 2048, '4G' 4096, '8G' 8192)
set xrange [60:8800]
set xlabel 'RAM, MiB'
set ylabel 'median, µs'
set yrange [1:*]
{script}'''


def smp(r):
    script = curves([
        (NAMES[engine],
         sorted((x['smp'], x['per_second']) for x in
                r.all(engine=engine, guest='linux', machine='q35',
                      accel='tcg', ram=256, virtio=False, pages=10)
                if x['per_second']))
        for engine in ('dirty', 'remap')])
    return 'Restores per second by vCPUs (TCG, q35, Linux, 10 pages)', \
        script and f'''
set logscale y
set format y "%g"
set xtics (1, 2, 4, 8)
set xrange [0.8:8.2]
set xlabel 'vCPUs'
set ylabel 'restores per second'
set key top right
{script}'''


def methods(r):
    bars = []
    for engine in NAMES:
        record = r.linux(engine) or r.floor(engine, 10)
        if record and record['us']['median']:
            bars.append((NAMES[engine], record['us']['median']))
    bars.sort(key=lambda bar: -bar[1])
    bars = [(i, value, f'"{name}"') for i, (name, value) in enumerate(bars)]
    if not any(r.linux(e) for e in NAMES):
        return '', None
    # Bars that lie: a box each, from the axis' lowest value
    return 'One restore of a Linux guest (TCG, q35 256M, 10 pages)', data(
        'd', bars) + f'''
set logscale x
set xrange [0.1:{20 * max(bar[1] for bar in bars)}]
set yrange [-0.6:{len(bars) - 0.4}]
set format x "10^{{%L}}"
set xlabel 'median, µs'
unset key
plot $d using (0.1):($1):(0.1):2:($1-0.35):($1+0.35):yticlabels(3) \\
     with boxxyerror fillstyle solid linecolor '{COLOURS[0]}', \\
     $d using ($2*1.15):1:(sprintf($2 < 10 ? '%.1f' : '%.0f', $2)) \\
     with labels left
'''


def phases(r):
    """Stacked bars: where the time of a restore with ram=dirty goes"""
    bars = []
    for record in r.all(engine='dirty', pages=10):
        if record['accel'] != 'tcg' or record['ram'] > 256:
            continue
        if record['guest'] == 'bare' and record['ram'] != 128:
            continue
        label = f'{record["machine"]} {record["guest"]}'
        if record['smp'] > 1:
            label += f'\\nsmp {record["smp"]}'
        if record['virtio']:
            label += '\\nvirtio'
        bars.append(['"' + label + '"'] +
                    [record['phases_us'][p] for p in PHASES])
    if not bars:
        return '', None
    return 'Where the time of a restore goes (TCG, ram=dirty, 10 pages)', data(
        'd', bars) + f'''
set style data histograms
set style histogram rowstacked
set style fill solid
set boxwidth 0.7
set ylabel 'median, µs'
set key outside right top invert
set bmargin 4
set xrange [-0.6:{len(bars) - 0.4}]
plot ''' + ', \\\n     '.join(
        f"$d using {i + 2}:xticlabels(1) linecolor '{COLOURS[i]}' "
        f"title '{name}'" for i, name in enumerate(PHASES)) + '\n'


PLOTS = {'pages': pages, 'ram': ram, 'smp': smp, 'methods': methods,
         'phases': phases}

TERMINALS = {
    'svg': "svg size 900,520 font 'sans,14' background '#ffffff'",
    'png': "pngcairo size 1350,780 font 'sans,13' fontscale 1.4 "
           "linewidth 1.4",
}


def draw(stem, script):
    """Draws @stem.svg and @stem.png. Returns their names."""
    files = []
    for ending, terminal in TERMINALS.items():
        files.append(stem.with_name(f'{stem.name}.{ending}'))
        # Not what an earlier run left, which would be taken for this one's
        files[-1].unlink(missing_ok=True)
        if not script:
            continue
        text = (f'set encoding utf8\nset terminal {terminal}\n'
                f'set output {quoted(files[-1])}\n{COMMON}\n{script}')
        try:
            subprocess.run(['gnuplot', '-'], input=text, text=True,
                           check=True, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise BenchError('there is no gnuplot; run: apt-get install '
                             'gnuplot-nox')
        except subprocess.CalledProcessError as e:
            raise BenchError(f'gnuplot fails on {files[-1]}: {e.stderr}')
    return files if script else []


def plots(results, directory):
    """Returns the names of the files that are in @directory now"""
    r = Records(results)
    made = []
    for name, plot in PLOTS.items():
        title, script = plot(r)
        made += [file.name for file in draw(
            directory / name,
            script and f'set title {quoted(title)}\n{script}')]
    return made

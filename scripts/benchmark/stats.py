# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures from many measurements"""


def percentile(values, fraction):
    """Nearest rank, of sorted @values"""
    return values[min(len(values) - 1, int(len(values) * fraction))]


def median(values):
    return percentile(sorted(values), 0.5)


def distribution(nanoseconds):
    """
    In microseconds. A percentile that so few values cannot tell is None: p999
    of fewer than 1000 would be their maximum.
    """
    values = sorted(ns / 1000 for ns in nanoseconds)
    return {
        'p10': percentile(values, 0.1),
        'median': percentile(values, 0.5),
        'p99': percentile(values, 0.99) if len(values) >= 100 else None,
        'p999': percentile(values, 0.999) if len(values) >= 1000 else None,
    }


def fit_line(points):
    """
    (fixed, each): y = fixed + each * x by least squares, with errors taken in
    relation to y. With absolute ones, the fixed part would be what is left
    over of the error at the largest x.
    """
    points = [(x, y, 1 / y ** 2) for x, y in points if y > 0]
    if len({x for x, _, _ in points}) < 2:
        return None
    w = sum(w for _, _, w in points)
    mean_x = sum(w * x for x, _, w in points) / w
    mean_y = sum(w * y for _, y, w in points) / w
    each = (sum(w * (x - mean_x) * (y - mean_y) for x, y, w in points) /
            sum(w * (x - mean_x) ** 2 for x, _, w in points))
    return mean_y - each * mean_x, each


def rates(dots, each, chunk=0.02):
    """
    Restores per second, from [(time, dots so far)] with a dot each @each
    restores: one for each chunk of at least @chunk seconds, sorted
    """
    rates, begin = [], dots[0] if dots else None
    for time, count in dots[1:]:
        if time - begin[0] >= chunk:
            rates.append((count - begin[1]) * each / (time - begin[0]))
            begin = time, count
    return sorted(rates)

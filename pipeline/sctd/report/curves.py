"""Curves of runs: points of their records, thinned out for pictures, and the mean of several runs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sctd.report.arms import Group, baseline_of
from sctd.report.gather import Run

AXES = {
    "step": "optimizer steps",
    "tokens": "tokens",
    "flops": "FLOPs (by formula)",
    "hours": "hours of training",
}
EARLY = 0.1  # of the steps: their losses say little, and would take most of a picture
_POINTS = 300  # of a curve in a picture


@dataclass(frozen=True)
class Curve:
    """`x`, `y`: of its points. `thin`: one of several runs, whose mean is drawn too."""

    group: Group
    x: tuple[float, ...]
    y: tuple[float, ...]
    thin: bool = False


def curves(groups: Sequence[Group], x: str, y: str, smooth: bool = False) -> list[Curve]:
    """Of every run, and of the mean of groups with several; those without a point are left out.

    Args:
        x, y: keys of records. smooth: the mean of neighbours instead of every n-th point.
    """
    found = []
    for group in groups:
        runs = group.trained
        for run in runs:
            found.append(Curve(group, *_thinned(list(_by_step(run, x, y).values()), smooth), thin=len(runs) > 1))
        if len(runs) > 1:
            found.append(Curve(group, *_thinned(_mean(runs, x, y), smooth)))
    return [curve for curve in found if curve.x]


def gaps(groups: Sequence[Group], x: str) -> list[Curve]:
    """Held-out loss minus that of the baseline of its class at the same x, for groups that have one: of their means."""
    lines = {id(curve.group): curve for curve in curves(groups, x, "valid_loss") if not curve.thin}
    found = []
    for group in groups:
        baseline = baseline_of(group, groups)
        mine, theirs = lines.get(id(group)), None if baseline is None else lines.get(id(baseline))
        if mine is None or theirs is None or mine is theirs:
            continue
        start, end = max(theirs.x[0], EARLY * theirs.x[-1]), theirs.x[-1]
        points = [(a, b) for a, b in zip(mine.x, mine.y, strict=True) if start <= a <= end]
        differences = [b - float(np.interp(a, theirs.x, theirs.y)) for a, b in points]
        found.append(Curve(group, tuple(a for a, _ in points), tuple(differences)))
    return [curve for curve in found if len(curve.x) > 1]


def _by_step(run: Run, x: str, y: str) -> dict[int, tuple[float, float]]:
    xs = run.known(x)
    return {step: (xs[step], value) for step, value in run.known(y).items() if step in xs}


def _mean(runs: Sequence[Run], x: str, y: str) -> list[tuple[float, float]]:
    """Over the runs, at the steps that all have on record."""
    points = [_by_step(run, x, y) for run in runs]
    steps = sorted(set.intersection(*map(set, points)))
    means = []
    for step in steps:
        xs, ys = zip(*(of_run[step] for of_run in points), strict=True)
        means.append((statistics.fmean(xs), statistics.fmean(ys)))
    return means


def _thinned(points: Sequence[tuple[float, float]], smooth: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of many points some hundreds, the last one among them."""
    size = -(-len(points) // _POINTS)
    if size > 1:
        parts = [points[max(0, end - size) : end] for end in range(len(points), 0, -size)][::-1]
        points = [_middle(part) if smooth else part[-1] for part in parts]
    return tuple(x for x, _ in points), tuple(y for _, y in points)


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return points[-1][0], statistics.fmean(y for _, y in points)

"""Tests of differences: Welch's over seeds, Holm's correction, Wilcoxon's over tasks, rank correlation."""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05  # of significance
CONFIDENCE = 1 - LEVEL
_EXACT = 9  # pairs whose orders can all be gone through


@dataclass(frozen=True)
class Difference:
    """Of two means: the first one minus the second.

    Args:
        interval: of confidence; p: of no difference. None where the values do not allow a test.
    """

    value: float
    interval: tuple[float, float] | None = None
    p: float | None = None


def welch(first: Sequence[float], second: Sequence[float]) -> Difference:
    """By Welch's t-test. No test of single values, or where neither side varies."""
    value = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2 or (np.ptp(first) == 0 and np.ptp(second) == 0):
        return Difference(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nearly equal values
        found = stats.ttest_ind(first, second, equal_var=False)
        interval = found.confidence_interval(CONFIDENCE)
    return Difference(value, (float(interval.low), float(interval.high)), float(found.pvalue))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p values for as many tests at once, by Holm's method; None stays None."""
    order = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = highest
    return adjusted


def wilcoxon(differences: Sequence[float]) -> float | None:
    """p of paired differences, by Wilcoxon's signed-rank test; None of fewer than two that are not 0."""
    others = [difference for difference in differences if difference]
    return float(stats.wilcoxon(others).pvalue) if len(others) > 1 else None


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Spearman's, and its p from all orders of up to 9 pairs, of which the usual approximation knows too little; both
    NaN where one side does not vary."""
    a, b = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (first, second))
    if not a.any() or not b.any():
        return float("nan"), float("nan")
    scale = np.sqrt((a @ a) * (b @ b))
    found = float(a @ b / scale)
    if len(a) > _EXACT:
        return found, float(stats.spearmanr(first, second).pvalue)
    orders = np.array(list(itertools.permutations(b))) @ a / scale
    return found, float(np.mean(np.abs(orders) >= abs(found) - 1e-12))


def two_shares(first: float, second: float, trials: int) -> Difference:
    """Of two shares of so many independent trials each: normal approximation."""
    value = first - second
    error = float(np.sqrt((first * (1 - first) + second * (1 - second)) / trials))
    return normal(value, error)


def normal(value: float, error: float) -> Difference:
    """Of a difference with this standard error: normal approximation."""
    if error == 0:
        return Difference(value)
    reach = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * error
    return Difference(value, (value - reach, value + reach), float(2 * stats.norm.sf(abs(value) / error)))

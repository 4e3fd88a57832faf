"""The order of samples: a fresh permutation of all rows for each epoch, computed entry by entry; of sources that are
mixed by weights, a permutation for each source and epoch.

A Feistel network over the next even number of bits is a bijection; walking its cycles until a value falls below N
makes it one on 0..N-1 (Black and Rogaway 2002). No index is kept in memory, and entry 10**9 costs what entry 0 costs.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sctd.data.draws import STREAM_ORDER, STREAM_SOURCE, U64, hash64, mix64

Span = tuple[int, int]  # [first, end) of global sample indices
_ROUNDS = 6
_LONGEST_PERIOD = 1 << 16


class Order:
    """Global sample index -> row, for rows in the order of their sources.

    Without weights all rows are one permutation, so each source has the share of its rows. With weights the sources
    take turns in a fixed pattern, evenly spread, in which each has exactly its share; the rows of a source are a
    permutation of their own, gone through anew when it is used up. Shares are exact for weights of up to four decimals
    or so (the pattern has at most 65,536 places), and no window of samples departs from them by more than two samples.

    Args:
        rows: of each source. weights: shares of the samples; what they leave of 1 is shared by those that have None,
            in proportion to their rows, and where these have no rows or all have a weight, the weights are taken
            relative to their sum.
    """

    def __init__(self, seed: int, rows: Sequence[int], weights: Sequence[float | None]) -> None:
        self._seed = seed
        self._rows = np.array(rows, dtype=np.int64)
        self._total = int(self._rows.sum())
        self._places = _places(rows, weights) if any(weight is not None for weight in weights) else None
        if self._places is not None:
            self._starts = np.cumsum(self._rows) - self._rows
            self._seeds = hash64(seed, STREAM_SOURCE, np.arange(len(rows), dtype=np.uint64))
            slots = np.argsort(_positions(self._places), kind="stable")
            self._source = np.repeat(np.arange(len(rows)), self._places)[slots]
            self._turn = np.concatenate([np.arange(count) for count in self._places])[slots]

    def __call__(self, sample: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows at global sample indices: int64, any shape."""
        if self._places is None:
            return row_of_sample(self._seed, sample, self._total)
        source, index = self.source_of(sample)
        found = np.empty_like(sample)
        for number in np.unique(source):
            mine = source == number
            row = row_of_sample(int(self._seeds[number]), index[mine], int(self._rows[number]))
            found[mine] = self._starts[number] + row
        return found

    def source_of(self, sample: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each sample, and the sample's number among those of its source. Only with weights."""
        assert self._places is not None
        period, slot = np.divmod(sample, len(self._source))
        source = self._source[slot]
        return source, period * self._places[source] + self._turn[slot]


def _places(rows: Sequence[int], weights: Sequence[float | None]) -> NDArray[np.int64]:
    """How many places of the pattern each source has."""
    given = {number: Fraction(str(weight)) for number, weight in enumerate(weights) if weight is not None}
    others = [number for number in range(len(rows)) if number not in given and rows[number]]
    if not others:
        total = sum(given.values(), Fraction(0))
        given = {number: share / total for number, share in given.items()}
    period = math.lcm(*(share.denominator for share in given.values()))
    # Shares of rows are seldom round: a longer pattern comes nearer to them, and keeps the given ones exact.
    period = _LONGEST_PERIOD if period > _LONGEST_PERIOD else period * (_LONGEST_PERIOD // period if others else 1)
    rest = 1 - sum(given.values(), Fraction(0))
    whole = max(1, sum(rows[number] for number in others))
    shares = [given.get(number, rest * Fraction(rows[number], whole)) for number in range(len(rows))]
    exact = [share * period for share in shares]
    places = [max(1 if share else 0, int(share)) for share in exact]
    order = sorted(range(len(rows)), key=lambda number: (places[number] - exact[number], number))
    for number in order[: max(0, period - sum(places))]:
        places[number] += 1
    while sum(places) > period:  # sources too small for a place have one: at the cost of the largest
        large = [number for number in others if places[number] > 1] or range(len(rows))
        places[max(large, key=lambda number: places[number])] -= 1
    return np.array(places, dtype=np.int64)


def _positions(places: NDArray[np.int64]) -> NDArray[np.float64]:
    """The places in the pattern that the turns of each source would have if it were alone: source after source."""
    return np.concatenate([(np.arange(count) + 0.5) / count for count in places if count])


def row_of_sample(seed: int, sample: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Rows of the corpus at global sample indices: each epoch visits every row once, in its own order.

    Args:
        sample: int64, any shape; sample g belongs to epoch g // rows.
        rows: N, number of rows of the split.
    """
    epoch, place = np.divmod(sample, rows)
    values = place.astype(np.uint64)
    keys = hash64(seed, STREAM_ORDER, epoch.astype(np.uint64))
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    pending = np.ones(values.shape, dtype=bool)
    while pending.any():
        values[pending] = _feistel(values[pending], keys[pending], half)
        pending &= values >= np.uint64(rows)
    return values.astype(np.int64)


def samples_from(cursor: int, count: int, passed_over: Iterable[Span]) -> tuple[NDArray[np.int64], int]:
    """The next `count` global sample indices, and the cursor after them.

    Args:
        cursor: the first index that may be taken. passed_over: half-open spans of indices that are not.
    """
    parts: list[NDArray[np.int64]] = []
    for first, end in sorted(passed_over):
        before = min(count, max(0, first - cursor))
        parts.append(np.arange(cursor, cursor + before))
        cursor, count = cursor + before, count - before
        if count == 0:
            break
        cursor = max(cursor, end)
    parts.append(np.arange(cursor, cursor + count))
    return np.concatenate(parts), cursor + count


def _feistel(values: U64, keys: U64, half: int) -> U64:
    """One pass over 2 x `half` bits."""
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for round_ in range(_ROUNDS):
        left, right = right, left ^ (mix64(right ^ keys ^ np.uint64(round_ << 60)) & mask)
    return (left << shift) | right

"""The order of samples: a fresh permutation of all rows for each epoch, computed entry by entry.

A Feistel network over the next even number of bits is a bijection; walking its cycles until a value falls below N
makes it one on 0..N-1 (Black and Rogaway 2002). No index is kept in memory, and entry 10**9 costs what entry 0 costs.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from sctd.data.hashing import STREAM_ORDER, U64, hash64, mix64

Span = tuple[int, int]  # [first, end) of global sample indices
_ROUNDS = 6


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
    """The next `count` global sample indices, and the cursor behind them.

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

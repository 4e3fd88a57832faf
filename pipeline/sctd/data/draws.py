"""Counter-based random draws in numpy: a value is a function of its seed and its counters, nothing is stored.

The mixer is SplitMix64 (Steele, Lea and Flood 2014, figure 15).
"""

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

# What a number is drawn for. Distinct streams are independent for the same seed and sample.
STREAM_ORDER, STREAM_MASK, STREAM_KIND, STREAM_TOKEN = range(4)
STREAM_TIES, STREAM_VALID, STREAM_DROPOUT, STREAM_SOURCE = range(4, 8)
STREAM_SPAN = 8

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: U64) -> U64:
    """A bijection on 64 bits whose output looks random."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash64(seed: int, stream: int, *counters: U64 | int) -> U64:
    """64 random bits for each combination of the counters (which broadcast)."""
    state = mix64(np.asarray(seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64) ^ np.uint64(stream << 56))
    for counter in counters:
        state = mix64(state ^ np.asarray(counter, dtype=np.uint64))
    return state


def below(bits: U64, bound: int) -> NDArray[np.int64]:
    """Random bits -> integers in 0..bound-1, bound <= 2**32 (multiply-shift; bias below bound / 2**32)."""
    return ((bits >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def unit(bits: U64) -> NDArray[np.float64]:
    """Random bits -> multiples of 2**-53 in [0, 1), in the same order."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

"""Counter-based random numbers: SplitMix64 in plain integers, independent streams, uniform draws."""

import numpy as np
import pytest

from sctd.data import draws
from sctd.data.draws import below, hash64, mix64, unit

MASK = 2**64 - 1
STREAMS = [value for name, value in vars(draws).items() if name.startswith("STREAM_")]


def splitmix(x: int) -> int:
    x = x + 0x9E3779B97F4A7C15 & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def test_the_mixer_is_splitmix64() -> None:
    """First outputs of the generator seeded with 0, as published."""
    assert splitmix(0) == 0xE220A8397B1DCDAF and splitmix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    values = np.array([0, 1, 0x9E3779B97F4A7C15, MASK], dtype=np.uint64)
    assert mix64(values).tolist() == [splitmix(int(v)) for v in values]


def test_every_argument_counts_and_counters_broadcast() -> None:
    rows, columns = np.arange(3, dtype=np.uint64)[:, None], np.arange(5, dtype=np.uint64)
    table = hash64(7, 2, rows, columns)
    assert table.shape == (3, 5) and len(set(table.ravel().tolist())) == 15
    assert int(table[2, 4]) == int(hash64(7, 2, 2, 4)) != int(hash64(7, 2, 4, 2))


def test_no_two_draws_coincide() -> None:
    """Over seeds, streams and counters, also where a seed and a counter change places."""
    counters = np.arange(20, dtype=np.uint64)
    drawn = np.concatenate([hash64(seed, stream, counters) for seed in range(20) for stream in STREAMS])
    assert len(set(drawn.tolist())) == 20 * 20 * 9
    pairs = np.stack([hash64(seed, 1, counters[:, None], counters) for seed in range(5)])
    assert len(set(pairs.ravel().tolist())) == 5 * 20 * 20


def test_only_64_bits_of_a_seed_count() -> None:
    assert int(hash64(2**64 + 5, 1, 2)) == int(hash64(5, 1, 2)) != int(hash64(2**63 + 5, 1, 2))


def test_streams_have_numbers_of_their_own() -> None:
    assert len(STREAMS) == len(set(STREAMS)) == 9 and all(0 <= stream < 256 for stream in STREAMS)


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 30522])
def test_below_is_uniform(bound: int) -> None:
    count = 60_000
    drawn = below(hash64(3, 1, np.arange(count, dtype=np.uint64)), bound)
    assert drawn.dtype == np.int64 and drawn.min() >= 0 and drawn.max() < bound
    if bound <= 10:
        sigma = (count / bound * (1 - 1 / bound)) ** 0.5
        assert np.abs(np.bincount(drawn, minlength=bound) - count / bound).max() <= 4.5 * sigma
    assert below(np.array([0, MASK], dtype=np.uint64), bound).tolist() == [0, bound - 1]


def test_unit_keeps_the_order_and_stays_below_1() -> None:
    bits = hash64(3, 1, np.arange(60_000, dtype=np.uint64))
    assert np.array_equal(np.argsort(unit(bits)), np.argsort(bits)) and abs(unit(bits).mean() - 0.5) < 0.006
    assert unit(np.array([0, MASK], dtype=np.uint64)).tolist() == [0.0, 1 - 2.0**-53]

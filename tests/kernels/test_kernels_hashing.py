"""The hashes that order ties: pinned to MurmurHash3's finaliser in plain Python integers, and what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd_kernels.hashing import hash_positions, mix_rows
from support import MASK32, fmix32, tie_hash

int64 = st.integers(-(2**63), 2**63 - 1)


def seeds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_the_mixer_is_murmur3() -> None:
    assert fmix32(1) == 0x514E28B7  # MurmurHash3_x86_32 of the empty key with seed 1, from Appleby's test vectors
    assert hash_positions(seeds(0), 2)[0].tolist() == [0, fmix32(0x514E28B7)]


@settings(deadline=None, max_examples=60)
@given(st.lists(int64, min_size=1, max_size=4), st.integers(1, 70))
def test_hash_equals_plain_integers(row_seeds: list[int], length: int) -> None:
    found = hash_positions(seeds(*row_seeds), length)
    assert found.dtype == torch.int64 and found.shape == (len(row_seeds), length)
    assert found.tolist() == [[tie_hash(seed, p) for p in range(length)] for seed in row_seeds]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), MASK32 - 100, 0x123456789ABCDEF0])
def test_hash_is_injective_in_a_row(seed: int) -> None:
    row = hash_positions(seeds(seed), 20_000)[0]
    assert len(set(row.tolist())) == 20_000
    assert int(row.min()) >= 0 and int(row.max()) < 2**32


def test_every_bit_of_the_seed_counts() -> None:
    seed = 0x0123456789ABCDEF
    base = hash_positions(seeds(seed), 8)[0]
    for bit in range(64):
        flipped = (seed ^ 1 << bit) - (2**64 if (seed ^ 1 << bit) >= 2**63 else 0)
        assert not (hash_positions(seeds(flipped), 8)[0] == base).all(), f"bit {bit} is ignored"


def test_hash_does_not_follow_position() -> None:
    """Of 64 positions each should win the draw about equally often: 31.25 times of 2000, sigma 5.5."""
    rng = torch.Generator().manual_seed(0)
    row_seeds = torch.randint(-(2**62), 2**62, (2000,), generator=rng)
    wins = torch.bincount(hash_positions(row_seeds, 64).argmax(1), minlength=64)
    assert wins.min() >= 31.25 - 4.5 * 5.6 and wins.max() <= 31.25 + 4.5 * 5.6


def test_streams_of_mixed_seeds_differ() -> None:
    rng = torch.Generator().manual_seed(1)
    row_seeds = torch.cat([seeds(0, 1, 2, 2**32, -1), torch.randint(-(2**62), 2**62, (200,), generator=rng)])
    mixed = torch.stack([mix_rows(row_seeds, stream) for stream in range(24)])
    assert mixed.dtype == torch.int64
    everything = torch.cat([mixed.flatten(), row_seeds]).tolist()
    assert len(set(everything)) == len(everything), "two (seed, stream) pairs share a draw"
    orders = {tuple(hash_positions(mix_rows(row_seeds[:1], s), 16)[0].argsort().tolist()) for s in range(24)}
    assert len(orders) == 24


def test_mixing_a_row_ignores_its_neighbours() -> None:
    row_seeds = seeds(5, -6, 7 << 40)
    assert mix_rows(row_seeds.flip(0), 3).tolist() == mix_rows(row_seeds, 3).flip(0).tolist()


@settings(deadline=None, max_examples=40)
@given(int64, st.integers(0, 63), st.integers(0, 30))
def test_every_bit_of_the_seed_reaches_each_stream(seed: int, bit: int, stream: int) -> None:
    flipped = (seed ^ 1 << bit) & (2**64 - 1)
    flipped -= 2**64 if flipped >= 2**63 else 0
    both = mix_rows(seeds(seed, flipped), stream)
    assert both[0] != both[1]

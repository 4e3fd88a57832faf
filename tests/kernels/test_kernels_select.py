"""Selection against a sort in plain Python, and the properties that the method rests on."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd_kernels import Selection, select
from support import tie_hash

SCORES = ("normal", "equal", "few", "zeros", "huge", "inf")


def oracle(scores: Any, keep: int, seeds: Any, forced_keep: Any = None, forced_drop: Any = None) -> list[list[int]]:
    """Kept positions of each row: by class (drop < plain < keep), then by score, then by hash; ascending."""
    rows = []
    for b, row in enumerate(np.asarray(scores, dtype=np.float32)):

        def rank(position: int, b: int = b, row: Any = row) -> tuple[int, float, int]:
            grade = 0
            if forced_keep is not None and forced_keep[b][position]:
                grade = 1
            if forced_drop is not None and forced_drop[b][position]:
                grade = -1
            return grade, float(row[position]) if grade == 0 else 0.0, tie_hash(int(seeds[b]), position)

        rows.append(sorted(sorted(range(len(row)), key=rank, reverse=True)[:keep]))
    return rows


def draw_scores(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    if kind == "equal":
        return np.full(shape, 10.0, np.float32)
    if kind == "few":
        return rng.integers(-2, 3, shape).astype(np.float32) / 4
    if kind == "zeros":
        return rng.choice(np.array([0.0, -0.0], np.float32), shape)
    if kind == "huge":
        return (rng.normal(size=shape) * 10.0 ** rng.integers(-45, 38, shape)).astype(np.float32)
    if kind == "inf":
        return rng.choice(np.array([np.inf, -np.inf, 0.0, 1e38, -1e38, 1e-45], np.float32), shape)
    return rng.normal(size=shape).astype(np.float32)


def check(selection: Selection, expected: list[list[int]], length: int) -> None:
    """All three maps of a selection, given the kept positions."""
    rows, keep = len(expected), len(expected[0])
    assert selection.kept_BK.tolist() == expected
    assert selection.dropped_BN.shape == (rows, length - keep)
    assert selection.dropped_BN.tolist() == [[s for s in range(length) if s not in row] for row in expected]
    inverse = [[row.index(s) if s in row else -1 for s in range(length)] for row in expected]
    assert selection.inverse_BS.tolist() == inverse
    assert {part.dtype for part in selection} == {torch.int64}
    assert all(part.is_contiguous() for part in selection)


@settings(deadline=None, max_examples=250)
@given(
    rows=st.integers(1, 5),
    length=st.integers(1, 67),
    data=st.data(),
    kind=st.sampled_from(SCORES),
    rng_seed=st.integers(0, 2**32 - 1),
)
def test_select_equals_the_oracle(rows: int, length: int, data: st.DataObject, kind: str, rng_seed: int) -> None:
    keep = data.draw(st.integers(1, length), label="keep")
    # infinite scores are outside of the contract beside forced positions: those are infinite too
    shares = st.sampled_from([None] if kind == "inf" else [None, 0.0, 0.1, 0.5, 0.9, 1.0])
    keep_share, drop_share = data.draw(shares, label="keep share"), data.draw(shares, label="drop share")
    rng = np.random.default_rng(rng_seed)
    scores = draw_scores(kind, rng, (rows, length))
    seeds = rng.integers(-(2**63), 2**63 - 1, rows)
    forced = [None if share is None else rng.random((rows, length)) < share for share in (keep_share, drop_share)]
    tensors = [None if mask is None else torch.from_numpy(mask) for mask in forced]
    selection = select(torch.from_numpy(scores), keep, torch.from_numpy(seeds), *tensors)
    check(selection, oracle(scores, keep, seeds, *forced), length)


@settings(deadline=None, max_examples=100)
@given(rows=st.integers(1, 4), length=st.integers(1, 100), data=st.data(), rng_seed=st.integers(0, 2**32 - 1))
def test_kept_and_dropped_are_a_permutation(rows: int, length: int, data: st.DataObject, rng_seed: int) -> None:
    keep = data.draw(st.integers(1, length))
    rng = np.random.default_rng(rng_seed)
    table = torch.from_numpy(rng.normal(size=50).astype(np.float32))
    ids = torch.from_numpy(rng.integers(0, 50, (rows, length)))
    selection = select(table[ids], keep, torch.from_numpy(rng.integers(0, 2**62, rows)), ids < 3, ids == 3)
    together = torch.cat([selection.kept_BK, selection.dropped_BN], dim=1)
    assert together.sort(dim=1).values.tolist() == [list(range(length))] * rows
    assert bool((selection.kept_BK.diff(dim=1) > 0).all()) and bool((selection.dropped_BN.diff(dim=1) > 0).all())
    restored = torch.gather(selection.kept_BK, 1, selection.inverse_BS.clamp(min=0))
    is_kept = selection.inverse_BS >= 0
    assert is_kept.sum(1).tolist() == [keep] * rows
    assert bool((restored == torch.arange(length))[is_kept].all())


def test_negative_zero_ties_with_zero() -> None:
    seeds = torch.arange(64, dtype=torch.int64) * 0x1234567
    zeros = torch.zeros(64, 32)
    mixed = torch.where(torch.arange(32) % 2 == 0, zeros, -zeros)
    assert bool(torch.signbit(mixed).any())
    assert torch.equal(select(mixed, 8, seeds).kept_BK, select(zeros, 8, seeds).kept_BK)


def test_scores_decide_before_the_hash() -> None:
    scores = torch.tensor([[1.0, float(np.nextafter(np.float32(1), np.float32(2))), 0.5, -1.0]]).expand(100, 4)
    kept = select(scores, 1, torch.arange(100)).kept_BK
    assert kept.flatten().tolist() == [1] * 100


@pytest.mark.parametrize("keep", [1, 5, 15, 16])
def test_more_forced_than_kept(keep: int) -> None:
    """The hash decides among specials, and no other token is kept whatever its score."""
    special = torch.tensor([[position % 2 == 0 for position in range(30)]]).expand(40, 30)
    scores = torch.where(special, -1e30, 1e30)
    seeds = torch.arange(40) + (7 << 40)
    selection = select(scores, keep, seeds, special)
    check(selection, oracle(scores, keep, seeds, special.numpy()), 30)
    plain_kept = (selection.kept_BK % 2 == 1).sum(1).tolist()
    assert plain_kept == [max(0, keep - 15)] * 40
    if keep < 15:
        assert len({tuple(row) for row in selection.kept_BK.tolist()}) > 10, "ties are not drawn per row"


def test_forced_drop_beats_forced_keep() -> None:
    both = torch.tensor([[True, False, False, True]]).expand(50, 4)
    kept = select(torch.zeros(50, 4), 2, torch.arange(50), both, both).kept_BK
    assert kept.tolist() == [[1, 2]] * 50


@settings(deadline=None, max_examples=100)
@given(length=st.integers(2, 60), data=st.data(), rng_seed=st.integers(0, 2**32 - 1))
def test_pad_is_never_kept_while_a_real_token_is_dropped(length: int, data: st.DataObject, rng_seed: int) -> None:
    keep = data.draw(st.integers(1, length))
    pads = data.draw(st.integers(0, length))
    rng = np.random.default_rng(rng_seed)
    is_pad = torch.from_numpy(rng.permutation(np.arange(length) < pads))[None]
    scores = torch.where(is_pad, 1e30, -1e30) if rng_seed % 2 else torch.zeros(1, length)
    selection = select(scores, keep, torch.tensor([rng_seed]), is_pad & (torch.rand(1, length) < 0.5), is_pad)
    kept_pads = int(is_pad[0][selection.kept_BK[0]].sum())
    assert kept_pads == max(0, keep - (length - pads))


def test_ties_are_not_decided_by_position() -> None:
    """All scores equal, as at the start of training: every position is kept half of the time."""
    rng = torch.Generator().manual_seed(3)
    seeds = torch.randint(-(2**62), 2**62, (2000,), generator=rng)
    counts = torch.bincount(select(torch.full((2000, 64), 10.0), 32, seeds).kept_BK.flatten(), minlength=64)
    assert counts.min() > 1000 - 4.5 * 22.4 and counts.max() < 1000 + 4.5 * 22.4


def test_choice_does_not_depend_on_the_place_in_the_batch() -> None:
    rng = torch.Generator().manual_seed(4)
    scores = torch.randint(0, 3, (33, 50), generator=rng).float()
    seeds = torch.randint(-(2**62), 2**62, (33,), generator=rng)
    forced_keep, forced_drop = (torch.rand(33, 50, generator=rng) < 0.1 for _ in range(2))
    whole = select(scores, 20, seeds, forced_keep, forced_drop)
    order = torch.randperm(33, generator=rng)
    shuffled = select(scores[order], 20, seeds[order], forced_keep[order], forced_drop[order])
    alone = []
    for row in range(33):
        one = slice(row, row + 1)
        alone.append(select(scores[one], 20, seeds[one], forced_keep[one], forced_drop[one]))
    for part in range(3):
        assert torch.equal(shuffled[part], whole[part][order])
        assert torch.equal(torch.cat([selection[part] for selection in alone]), whole[part])


def test_another_seed_draws_other_ties() -> None:
    scores = torch.zeros(1, 64)
    drawn = {tuple(select(scores, 32, torch.tensor([seed])).kept_BK[0].tolist()) for seed in range(50)}
    assert len(drawn) == 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_scores(dtype: torch.dtype) -> None:
    scores = torch.randn(4, 31, generator=torch.Generator().manual_seed(0)).to(dtype)
    seeds = torch.arange(4)
    assert select(scores, 9, seeds).kept_BK.tolist() == oracle(scores.float().numpy(), 9, seeds)


def test_inputs_are_left_alone_and_layout_does_not_matter() -> None:
    scores = torch.randn(31, 6).T
    forced = torch.zeros(31, 6, dtype=torch.bool).T
    forced[:, 3] = True
    before = scores.clone(), forced.clone()
    seeds = torch.arange(12)[::2]
    selection = select(scores, 10, seeds, forced, ~forced)
    assert torch.equal(scores, before[0]) and torch.equal(forced, before[1])
    again = select(scores.contiguous(), 10, seeds.clone(), forced.contiguous(), (~forced).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(selection, again, strict=True))


def test_no_gradient_leaves_a_selection() -> None:
    selection = select(torch.randn(2, 8, requires_grad=True), 4, torch.arange(2))
    assert not any(part.requires_grad for part in selection)


OK = {"scores_BS": torch.zeros(2, 8), "keep": 4, "row_seed_B": torch.arange(2)}
BOOLS = torch.zeros(2, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keep": 0}, ("keep=0", "(2, 8)")),
        ({"keep": 9}, ("keep=9", "(2, 8)")),
        ({"keep": -1}, ("keep=-1", "(2, 8)")),
        ({"scores_BS": torch.zeros(8)}, ("(8,)",)),
        ({"scores_BS": torch.zeros(2, 8, 1)}, ("(2, 8, 1)",)),
        ({"scores_BS": torch.zeros(2, 8, dtype=torch.long)}, ("int64", "(2, 8)")),
        ({"row_seed_B": torch.arange(3)}, ("(3,)", "(2, 8)")),
        ({"row_seed_B": torch.arange(4).view(2, 2)}, ("(2, 2)", "(2, 8)")),
        ({"forced_keep_BS": BOOLS[:1]}, ("forced_keep", "(1, 8)", "(2, 8)")),
        ({"forced_drop_BS": BOOLS[:, :7]}, ("forced_drop", "(2, 7)", "(2, 8)")),
        ({"forced_drop_BS": BOOLS.to("meta")}, ("forced_drop", "meta", "cpu")),
    ],
)
def test_misfits_are_refused_with_their_shapes(change: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="select") as caught:
        select(**{**OK, **change})
    assert all(text in str(caught.value) for text in said), str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"row_seed_B": torch.arange(2, dtype=torch.int32)}, "int32"),  # half of the seed would be lost
        ({"row_seed_B": torch.zeros(2)}, "float32"),
        ({"row_seed_B": torch.arange(2, device="meta")}, "meta"),
        ({"forced_keep_BS": BOOLS.float()}, "float32"),
        ({"forced_drop_BS": BOOLS.long()}, "int64"),
    ],
)
def test_wrong_dtypes_and_devices_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="select") as caught:
        select(**{**OK, **change})
    assert said in str(caught.value), str(caught.value)

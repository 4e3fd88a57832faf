"""Selection against a sort in plain Python, and the properties that the method rests on."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_checks import check, check_select, oracle, select_cases
from sctd_kernels import Selection, select
from sctd_kernels.select import reference


@settings(deadline=None, max_examples=300)
@given(select_cases())
def test_select_equals_the_oracle(case: dict[str, Any]) -> None:
    check_select(case)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
    assert all(torch.equal(a, b) for a, b in zip(selection[:3], again[:3], strict=True))


def test_no_gradient_leaves_a_selection() -> None:
    selection = select(torch.randn(2, 8, requires_grad=True), 4, torch.arange(2))
    assert not any(part.requires_grad for part in selection[:3])


@pytest.mark.parametrize("keep", [1, 4095, 8192])
def test_the_longest_rows(keep: int) -> None:
    rng = torch.Generator().manual_seed(keep)
    scores = torch.randint(0, 4, (2, 8192), generator=rng).float()
    check_select({"scores_BS": scores, "keep": keep, "row_seed_B": torch.tensor([3, -3 << 40])})


def test_no_rows() -> None:
    selection = select(torch.zeros(0, 8), 3, torch.zeros(0, dtype=torch.int64), carry=(torch.zeros(0, 8).bool(),))
    shapes = [tuple(part.shape) for part in (*selection[:3], *selection.carried)]
    assert shapes == [(0, 3), (0, 5), (0, 8), (0, 3)]


def test_a_table_is_a_lookup_before() -> None:
    rng = torch.Generator().manual_seed(6)
    table = torch.randn(100, generator=rng)
    table[3], table[4] = float("inf"), float("-inf")
    ids = torch.randint(0, 100, (7, 60), generator=rng)
    seeds = torch.arange(7)
    looked_up = select(table[ids], 30, seeds)
    for kind in (torch.int64, torch.int32):
        selection = select(ids.to(kind), 30, seeds, table_V=table)
        assert all(torch.equal(a, b) for a, b in zip(selection[:3], looked_up[:3], strict=True))
    assert bool((selection.inverse_BS[ids == 3] >= 0).all()) and bool((selection.inverse_BS[ids == 4] < 0).all())


@settings(deadline=None, max_examples=50)
@given(rng_seed=st.integers(0, 2**32 - 1), length=st.integers(1, 60), data=st.data())
def test_forcing_is_an_infinite_score(rng_seed: int, length: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, length))
    rng = torch.Generator().manual_seed(rng_seed)
    scores = torch.randint(-1, 2, (4, length), generator=rng).float()
    stay, go = (torch.rand(4, length, generator=rng) < 0.3 for _ in range(2))
    infinite = scores.masked_fill(stay, float("inf")).masked_fill(go, float("-inf"))
    seeds = torch.randint(2**62, (4,), generator=rng)
    both = select(scores, keep, seeds, stay, go), select(infinite, keep, seeds)
    assert all(torch.equal(a, b) for a, b in zip(both[0][:3], both[1][:3], strict=True))


def test_carried_entries_are_those_of_kept_positions() -> None:
    segments = torch.arange(24).view(2, 12) // 5
    real = segments % 2 == 0
    selection = select(torch.randn(2, 12), 5, torch.arange(2), carry=[segments, real])
    for carried, whole in zip(selection.carried, (segments, real), strict=True):
        assert carried.tolist() == [[whole[b, s].item() for s in selection.kept_BK[b]] for b in range(2)]
    assert select(torch.randn(2, 12), 5, torch.arange(2)).carried == ()


def test_nan_is_refused_and_placed() -> None:
    scores = torch.zeros(3, 8)
    scores[1, 6] = scores[2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"select: NaN in the scores \(3, 8\), first at \(1, 6\)"):
        select(scores, 4, torch.arange(3))
    table = torch.zeros(9)
    table[7] = float("nan")
    with pytest.raises(ValueError, match=r"select: NaN in the table \(9,\), first at \(7,\)"):
        select(torch.zeros(3, 8, dtype=torch.long), 4, torch.arange(3), table_V=table)


def test_nan_ranks_last_where_nobody_looks() -> None:
    """On a GPU the check would make the host wait; the reference must rank NaN as the kernels do."""
    scores = torch.tensor([[float("nan"), float("-inf"), 0.0, -float("nan"), float("-inf"), -1e38]]).expand(60, 6)
    seeds = torch.arange(60)
    selection = Selection(*reference.select(scores, 4, seeds, None, None, None, ()))
    check(selection, oracle(scores, 4, seeds.tolist()), 6)
    assert len({tuple(row) for row in selection.kept_BK.tolist()}) == 6, "NaN and -inf do not tie"


OK = {"scores_BS": torch.zeros(2, 8), "keep": 4, "row_seed_B": torch.arange(2)}
BOOLS = torch.zeros(2, 8, dtype=torch.bool)
IDS = torch.zeros(2, 8, dtype=torch.long)
TABLE = torch.zeros(5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keep": 0}, ("keep=0", "(2, 8)")),
        ({"keep": 9}, ("keep=9", "(2, 8)")),
        ({"keep": -1}, ("keep=-1", "(2, 8)")),
        ({"scores_BS": torch.zeros(8)}, ("(8,)",)),
        ({"scores_BS": torch.zeros(2, 8, 1)}, ("(2, 8, 1)",)),
        ({"scores_BS": torch.zeros(2, 8, dtype=torch.long)}, ("int64", "(2, 8)")),
        ({"scores_BS": torch.zeros(2, 8, dtype=torch.float64)}, ("float64", "(2, 8)")),
        ({"scores_BS": torch.zeros(2, 8193)}, ("8192", "(2, 8193)")),
        ({"scores_BS": torch.zeros(2, 0)}, ("keep=4", "(2, 0)")),
        ({"table_V": TABLE}, ("float32", "(2, 8)", "int64 or int32")),
        ({"table_V": TABLE, "scores_BS": IDS.short()}, ("int16", "(2, 8)")),
        ({"table_V": TABLE, "scores_BS": IDS[0]}, ("(8,)",)),
        ({"table_V": TABLE.double(), "scores_BS": IDS}, ("table", "float64")),
        ({"table_V": TABLE[:0], "scores_BS": IDS}, ("table", "(0,)")),
        ({"table_V": TABLE[None], "scores_BS": IDS}, ("table", "(1, 5)")),
        ({"table_V": TABLE.to("meta"), "scores_BS": IDS}, ("table", "cpu", "meta")),
        ({"table_V": TABLE, "scores_BS": IDS + 5}, ("ids", "(2, 8)", "5..5", "0..4")),
        ({"table_V": TABLE, "scores_BS": IDS - 1}, ("ids", "(2, 8)", "-1..-1", "0..4")),
        ({"carry": (BOOLS, BOOLS, BOOLS)}, ("carry", "3")),
        ({"carry": (BOOLS, BOOLS[:, :7])}, ("carry", "(2, 7)", "(2, 8)")),
        ({"carry": (BOOLS.float(),)}, ("carry", "float32")),
        ({"carry": (BOOLS.to("meta"),)}, ("carry", "meta", "cpu")),
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

"""What every backend of select, split and merge must satisfy, for the tests of each and for those on GPUs.

Cases are drawn on the CPU; what is expected is worked out in plain Python or by torch's own gather and scatter.
"""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from sctd_kernels import Selection, gather, gather_rows, merge, select, split
from support import tie_hash

SCORES = ("normal", "equal", "few", "zeros", "huge", "inf")
HALVES = (torch.bfloat16, torch.float16)


def draw_scores(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
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


def oracle(scores: Any, keep: int, seeds: Any, forced_keep: Any = None, forced_drop: Any = None) -> list[list[int]]:
    """Kept positions of each row, ascending: by score, then by hash; forcing is an infinite score, NaN is -inf."""
    effective = np.array(scores, dtype=np.float32)
    effective[np.isnan(effective)] = -np.inf
    if forced_keep is not None:
        effective[np.asarray(forced_keep)] = np.inf
    if forced_drop is not None:
        effective[np.asarray(forced_drop)] = -np.inf
    rows = []
    for row, seed in zip(effective.tolist(), seeds, strict=True):
        ranking = sorted(((score, tie_hash(int(seed), s), s) for s, score in enumerate(row)), reverse=True)
        rows.append(sorted(s for _, _, s in ranking[:keep]))
    return rows


def check(selection: Selection, expected: list[list[int]], length: int) -> None:
    """All three maps of a selection, given the kept positions."""
    rows, keep = len(expected), len(expected[0])
    maps = selection[:3]
    assert selection.kept_BK.tolist() == expected
    assert selection.dropped_BN.shape == (rows, length - keep)
    assert selection.dropped_BN.tolist() == [sorted({*range(length)} - {*row}) for row in expected]
    ranks = [{position: rank for rank, position in enumerate(row)} for row in expected]
    assert selection.inverse_BS.tolist() == [[row.get(s, -1) for s in range(length)] for row in ranks]
    assert {part.dtype for part in maps} == {torch.int64}
    assert all(part.is_contiguous() for part in maps)


@st.composite
def select_cases(draw: st.DrawFn, max_rows: int = 9, max_length: int = 150) -> dict[str, Any]:
    """Arguments of `select`, of every kind that it takes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, max_rows)), draw(st.integers(1, max_length))
    keep = draw(st.sampled_from([1, shape[1], None])) or draw(st.integers(1, shape[1]))
    case: dict[str, Any] = {"keep": keep, "row_seed_B": torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, shape[0]))}
    kind = draw(st.sampled_from(SCORES))
    if draw(st.booleans()):
        vocabulary = draw(st.sampled_from([1, 2, 20, 1000]))
        dtype = draw(st.sampled_from([torch.int64, torch.int32]))
        case["scores_BS"] = torch.from_numpy(rng.integers(0, vocabulary, shape)).to(dtype)
        case["table_V"] = torch.from_numpy(draw_scores(kind, rng, (vocabulary,)))
    else:
        dtype = draw(st.sampled_from([torch.float32, *HALVES]))
        case["scores_BS"] = torch.from_numpy(draw_scores(kind, rng, shape)).to(dtype)
    for name in ("forced_keep_BS", "forced_drop_BS"):
        share = draw(st.sampled_from([None, 0.0, 0.1, 0.9, 1.0]))
        case[name] = None if share is None else torch.from_numpy(rng.random(shape) < share)
    carry = draw(st.lists(st.sampled_from([torch.bool, torch.int32, torch.int64]), max_size=2))
    case["carry"] = tuple(torch.from_numpy(rng.integers(-2, 2**31, shape)).to(dtype) for dtype in carry)
    return case


def to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(to(part, device) for part in value) if isinstance(value, tuple) else value


def check_select(case: dict[str, Any], device: str = "cpu") -> None:
    """The backend in use against plain Python."""
    selection = select(**{name: to(value, device) for name, value in case.items()})
    scores_BS = case["scores_BS"] if case.get("table_V") is None else case["table_V"][case["scores_BS"].long()]
    forced = case.get("forced_keep_BS"), case.get("forced_drop_BS")
    expected = oracle(scores_BS.float(), case["keep"], case["row_seed_B"].tolist(), *forced)
    check(selection, expected, scores_BS.shape[1])
    carry = case.get("carry", ())
    assert len(selection.carried) == len(carry)
    for carried_BK, whole_BS in zip(selection.carried, carry, strict=True):
        assert carried_BK.dtype == whole_BS.dtype and carried_BK.is_contiguous()
        assert torch.equal(carried_BK.cpu(), whole_BS.gather(1, selection.kept_BK.cpu()))


def random_selection(rows: int, length: int, keep: int, seed: int = 0, device: str = "cpu") -> Selection:
    rng = torch.Generator().manual_seed(seed)
    scores, seeds = torch.rand(rows, length, generator=rng), torch.randint(2**62, (rows,), generator=rng)
    return select(scores.to(device), keep, seeds.to(device))


def numbers(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def wide(index_BK: Tensor, width: int) -> Tensor:
    return index_BK[:, :, None].expand(-1, -1, width)


def check_moves(
    rows: int,
    length: int,
    keep: int,
    width: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    whole_grads: bool = False,
) -> None:
    """gather, gather_rows, split and merge of the backend in use, values and gradients, against torch's operations.

    Args:
        whole_grads: gradients are small whole numbers, whose sums no dtype rounds.
    """
    selection = random_selection(rows, length, keep, seed, device)
    shuffled_BK = selection.kept_BK.flip(1)
    hidden = numbers(rows, length, width, seed=seed + 1, dtype=dtype, device=device)
    kept = numbers(rows, keep, width, seed=seed + 2, dtype=dtype, device=device)
    grads = [numbers(rows, n, width, seed=seed + n, dtype=dtype, device=device) for n in (keep, length)]
    grads = [(grad * 4).round() for grad in grads] if whole_grads else grads
    index, back = wide(selection.kept_BK, width), wide(shuffled_BK, width)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for results, own in ((ours, True), (theirs, False)):
        h, k = hidden.clone().requires_grad_(), kept.clone().requires_grad_()
        merged = merge(h, k, selection) if own else h.scatter(1, index, k)
        results += [merged, *torch.autograd.grad(merged, (h, k), grads[1])]
        taken = gather(h, selection) if own else h.gather(1, index)
        results += [taken, *torch.autograd.grad(taken, h, grads[0])]
        taken = gather_rows(h, shuffled_BK) if own else h.gather(1, back)
        results += [taken, *torch.autograd.grad(taken, h, grads[0])]
        parts = split(h, selection) if own else (h.gather(1, index), h.view_as(h))
        results += [*parts, *torch.autograd.grad(parts, h, grads, retain_graph=True)]
        results += torch.autograd.grad(parts[0], h, grads[0], retain_graph=True)
        results += torch.autograd.grad(parts[1], h, grads[1])
    for ours_part, theirs_part in zip(ours, theirs, strict=True):
        assert ours_part.dtype == theirs_part.dtype == dtype
        assert torch.equal(ours_part, theirs_part)

"""The Triton kernels under Triton's interpreter, against plain Python and torch: what they compute, not how fast.

With a GPU, tests/gpu runs the same checks natively.
"""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_checks import HALVES, check, check_moves, check_select, numbers, oracle, select_cases
from sctd_kernels import Selection, gather, gather_rows, merge, rotary_table, select, split
from sctd_kernels.gather_merge import GATHER
from sctd_kernels.rotary import ROTATE
from sctd_kernels.select import SELECT

pytestmark = [
    pytest.mark.run,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, which GPUs have no use for"
    ),
]


@pytest.fixture(autouse=True, scope="module")
def on_triton() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCTD_KERNELS", "triton")
        yield


@pytest.fixture(params=["many rows a program", "one row a program"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's large tiles, or small ones in many programs, as on GPUs."""
    if request.param == "one row a program":
        monkeypatch.setattr(kernels("select"), "_TILE", 1)
        monkeypatch.setattr(kernels("gather_merge"), "_TILE", 64)


def kernels(package: str) -> ModuleType:
    return importlib.import_module(f"sctd_kernels.{package}.triton")


def test_the_interpreter_was_chosen_in_time() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    assert isinstance(kernels("select")._select_kernel, InterpretedFunction), "triton was imported before conftest.py"


def test_triton_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(kernels("select"), "select", lambda *arguments: calls.append(arguments))
    select(torch.zeros(1, 2), 1, torch.arange(1))
    assert len(calls) == 1


@settings(deadline=None, max_examples=60)
@given(select_cases())
def test_select_equals_the_oracle(case: dict[str, Any]) -> None:
    check_select(case)


@pytest.mark.parametrize(("rows", "length", "keep"), [(9, 8192, 4096), (1, 8192, 8192), (3, 8191, 1), (5, 1, 1)])
def test_select_at_the_ends_of_the_range(rows: int, length: int, keep: int) -> None:
    """Nine rows of 8192 positions take two programs; ties between the hash's halves decide nearly all of them."""
    rng = torch.Generator().manual_seed(rows)
    scores = torch.randint(0, 2, (rows, length), generator=rng).float()
    check_select({"scores_BS": scores, "keep": keep, "row_seed_B": torch.arange(rows) - (2 << 50)})


def test_select_in_tiles(tiles: None) -> None:
    rng = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 3, (5, 37), generator=rng).to(torch.bfloat16)
    forced = torch.rand(5, 37, generator=rng) < 0.6
    carry = (torch.arange(185).view(5, 37), forced)
    check_select({
        "scores_BS": scores,
        "keep": 13,
        "row_seed_B": torch.arange(5),
        "forced_keep_BS": forced,
        "forced_drop_BS": forced & (scores > 0),
        "carry": carry,
    })  # fmt: skip


def test_select_of_strided_arguments() -> None:
    rng = torch.Generator().manual_seed(2)
    scores, mask = torch.randn(31, 6, generator=rng).T, (torch.rand(31, 12, generator=rng) < 0.3).T[::2]
    check_select({
        "scores_BS": scores,
        "keep": 10,
        "row_seed_B": torch.arange(12)[::2],
        "forced_keep_BS": mask,
        "forced_drop_BS": mask.flip(0),
        "carry": (mask,),
    })  # fmt: skip
    ids, table = torch.randint(0, 40, (31, 6), generator=rng).T, torch.randn(40, 2, generator=rng)[:, 1]
    check_select({"scores_BS": ids, "keep": 10, "row_seed_B": torch.arange(6), "table_V": table})


def test_negative_zero_ties_with_zero() -> None:
    zeros = torch.tensor([0.0, -0.0]).repeat(20, 9)
    check_select({"scores_BS": zeros, "keep": 7, "row_seed_B": torch.arange(20)})


def test_nan_ranks_as_the_lowest_score() -> None:
    scores = torch.tensor([[float("nan"), float("-inf"), 0.0, -float("nan"), float("-inf"), -1e38]]).repeat(20, 1)
    for dtype in (torch.float32, *HALVES):
        narrowed, seeds = scores.to(dtype), torch.arange(20)
        found = SELECT.run("triton", narrowed, 4, seeds, None, None, None, [])
        check(Selection(*found), oracle(narrowed.float(), 4, seeds.tolist()), 6)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_score(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    scores = patterns.view(dtype)[torch.randperm(2**16, generator=rng)].view(8, 8192)
    arguments = torch.arange(8), None, None, None, []
    for keep in (100, 4096, 8000):
        found, expected = (SELECT.run(chosen, scores, keep, *arguments) for chosen in ("triton", "torch"))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_ids_outside_of_the_table_are_moved_into_it() -> None:
    ids, table = torch.tensor([[-5, 0, 3, 99, 2**40, -(2**40)]]).repeat(9, 1), torch.tensor([1.0, 0.0, 2.0, 3.0])
    arguments = 3, torch.arange(9), None, None, table, []
    found, expected = (SELECT.run(chosen, ids, *arguments) for chosen in ("triton", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_positions_out_of_range_are_moved_into_it() -> None:
    hidden = numbers(2, 5, 3, seed=0, dtype=torch.float32)
    found = GATHER.run("triton", hidden, torch.tensor([[-1, 2**40], [4, 5]]))
    assert torch.equal(found, torch.stack([hidden[0, [0, 4]], hidden[1, [4, 4]]]))


def test_places_out_of_range_are_moved_into_it() -> None:
    x, table = numbers(1, 4, 2, 6, seed=0, dtype=torch.float32), rotary_table(5, 6, 100.0, "cpu")
    found = ROTATE.run("triton", x, table, torch.tensor([[-1, 5, 2**40, 3]]), False)
    assert torch.equal(found, ROTATE.run("triton", x, table, torch.tensor([[0, 4, 4, 3]]), False))


@settings(deadline=None, max_examples=12)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 70),
    width=st.sampled_from([1, 3, 16, 33, 128, 130]),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    data=st.data(),
)
def test_moves_equal_torch(rows: int, length: int, width: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """Triton's interpreter cuts bfloat16 sums off where a GPU rounds them, hence whole numbers to add."""
    keep, seed = data.draw(st.integers(1, length)), data.draw(st.integers(0, 1000))
    check_moves(rows, length, keep, width, dtype, seed=seed, whole_grads=dtype == torch.bfloat16)


@pytest.mark.parametrize("width", [5, 384, 1030])
def test_moves_in_tiles(tiles: None, width: int) -> None:
    """1030 columns take more than one program for each row, and the last of them is nearly empty."""
    check_moves(2, 19, 7, width, torch.float32)


def test_moves_in_float64() -> None:
    check_moves(2, 9, 4, 3, torch.float64)


def test_strided_and_expanded_states() -> None:
    hidden = numbers(4, 12, 3, seed=0, dtype=torch.float32).permute(2, 1, 0)
    kept = numbers(1, 1, 4, seed=1, dtype=torch.float32).expand(3, 5, 4)
    selection = select(torch.randn(3, 12), 5, torch.arange(3))
    results = []
    for h, k in ((hidden, kept), (hidden.contiguous(), kept.contiguous())):
        h = h.detach().requires_grad_()
        parts = split(h, selection)
        out = merge(parts[1], k, selection)
        # a transposed and an expanded cotangent
        loss = (out.transpose(0, 2) * torch.arange(4.0)[:, None, None]).sum() + parts[0].sum()
        results.append((*parts, out, *torch.autograd.grad(loss, h)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0)])
def test_nothing_to_move(shape: tuple[int, int, int]) -> None:
    hidden = torch.zeros(shape, requires_grad=True)
    selection = select(torch.zeros(shape[:2]), 4, torch.arange(shape[0]), carry=(torch.zeros(shape[:2]).bool(),))
    kept, rest = split(hidden, selection)
    merge(rest, kept, selection).sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == shape


def middle(hidden: Tensor, weight: Tensor, scores: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """All of the package's sorting and moving, as a model uses it."""
    selection = select(scores, 5, seeds, carry=(scores > 0,))
    kept, rest = split(hidden, selection)
    kept = torch.tanh(kept @ weight) * selection.carried[0][:, :, None] + gather(hidden.sin(), selection)
    merged = merge(rest, kept, selection)
    return merged, gather_rows(merged, selection.kept_BK[:, :3])


@pytest.mark.parametrize("kernels_asked", ["torch", "triton"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_takes_it_whole(monkeypatch: pytest.MonkeyPatch, kernels_asked: str, compiler: str) -> None:
    if compiler == "inductor" and shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setenv("SCTD_KERNELS", kernels_asked)
    hidden, weight = (numbers(*shape, seed=3, dtype=torch.float32) for shape in ((3, 11, 8), (8, 8)))
    scores, seeds = numbers(3, 11, seed=4, dtype=torch.float32), torch.arange(3)
    results = []
    torch._dynamo.reset()
    for function in (middle, torch.compile(middle, backend=compiler, fullgraph=True)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        outputs = function(h, w, scores, seeds)
        loss = outputs[0].square().sum() + outputs[1].sum()
        results.append((*outputs, *torch.autograd.grad(loss, (h, w))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_operators_keep_their_promises() -> None:
    """Schemas, fakes and aliases, by torch's own checker."""
    scores, seeds = torch.randn(2, 9), torch.arange(2)
    hidden, selection = torch.randn(2, 9, 4), select(scores, 5, seeds)
    index, inverse = selection.kept_BK, selection.inverse_BS
    tests = ("test_schema", "test_faketensor")
    rate = round(0.1 * 65536)
    states = [hidden, torch.randn(2, 9, 4), torch.ones(4), torch.zeros(4), 1e-5, seeds, 1, rate]
    saved = torch.ops.sctd.add_norm(*states)[1:]
    calls: list[tuple[str, list[Any]]] = [
        ("select", [scores, 5, seeds, scores > 1, None, None, [scores > 0]]),
        ("gather", [hidden, index]),
        ("split_backward", [torch.randn(2, 5, 4), None, index, inverse]),
        ("merge", [hidden, torch.randn(2, 5, 4), index, inverse]),
        ("merge_backward", [hidden, index, inverse]),
        ("geglu", [hidden, None]),
        ("geglu", [hidden, hidden[..., ::2]]),
        ("bias_gelu", [hidden, torch.ones(4), None]),
        ("bias_gelu", [hidden, torch.ones(4), hidden]),
        ("dropout", [hidden, seeds, 1, rate]),
        ("add_norm", states),
        ("add_norm_backward", [hidden, torch.ones(4), seeds, saved, 1, rate, torch.float32]),
        ("rotate", [torch.randn(2, 9, 3, 3, 4)[:, :, 1], torch.randn(2, 11, 2), inverse.clamp(min=0), True]),
        ("token_losses", [scores, seeds, torch.zeros(2, 9, dtype=torch.int64)]),
        ("token_losses_backward", [scores, seeds, torch.randn(2), torch.randn(2)]),
    ]
    for name, arguments in calls:
        torch.library.opcheck(getattr(torch.ops.sctd, name).default, tuple(arguments), test_utils=tests)

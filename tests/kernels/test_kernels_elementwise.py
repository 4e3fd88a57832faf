"""Dropout, dropout + residual + LayerNorm, GELUs and cross-entropy: torch, and Triton under its interpreter."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elementwise_checks import check_add_norm, check_dropout, check_geglu, check_gelu, check_token_losses, keep_mask
from sctd_kernels import dropout, dropout_add_norm, geglu, linear_gelu, token_losses

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


pytestmark = pytest.mark.usefixtures("asked")


@settings(deadline=None, max_examples=20)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)),
    st.sampled_from([FLOAT, HALF]),
    st.sampled_from([0.1, 0.5, 1 / 65536, 0.9]),
)
def test_dropout_is_its_definition(shape: tuple[int, int, int], dtype: torch.dtype, rate: float) -> None:
    check_dropout(shape, dtype, rate)


@settings(deadline=None, max_examples=20)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(16, 70)),
    st.sampled_from([(FLOAT, FLOAT), (BF16, FLOAT), (HALF, HALF)]),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_add_norm_and_its_gradients(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], rate: float
) -> None:
    check_add_norm(shape, *dtypes, rate)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 40), st.sampled_from([FLOAT, BF16, HALF]), st.booleans())
def test_linear_gelu_and_its_gradients(rows: int, width: int, inner: int, dtype: torch.dtype, has_bias: bool) -> None:
    check_gelu(rows, width, inner, dtype, has_bias)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 6), max_size=2), st.integers(1, 40), st.sampled_from([FLOAT, BF16, HALF]))
def test_geglu_and_its_gradients(shape: list[int], inner: int, dtype: torch.dtype) -> None:
    check_geglu((*shape, 2 * inner), dtype)


@pytest.mark.parametrize("shape", [(3, 2 * 1152), (5, 2 * 1030), (0, 6), (3, 0)])
def test_geglu_of_usual_and_of_no_widths(shape: tuple[int, int]) -> None:
    check_geglu(shape, FLOAT)


def test_geglu_of_a_strided_input_and_gradient() -> None:
    x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0).requires_grad_()
    found = []
    for given_x in (x, x.contiguous()):
        out = geglu(given_x)
        found.append((out, *torch.autograd.grad((out.mT * torch.arange(4.0)).sum(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 40), st.integers(1, 300), st.sampled_from([FLOAT, BF16, HALF]))
def test_token_losses_gradients_and_accumulators(count: int, vocab: int, dtype: torch.dtype) -> None:
    check_token_losses(count, vocab, dtype)


@pytest.mark.parametrize("width", [768, 1024, 1023])
def test_usual_widths(width: int) -> None:
    check_add_norm((2, 3, width), FLOAT, FLOAT, 0.1)


def test_several_blocks_of_vocabulary() -> None:
    check_token_losses(37, 9001, FLOAT)


def test_a_row_draws_the_same_wherever_it_stands() -> None:
    x, seeds = torch.ones(4, 6, 32), torch.tensor([5, 5, -9, 1 << 40])
    out = dropout(x, 0.3, seeds, 2)
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    assert torch.equal(dropout(x[2:], 0.3, seeds[2:], 2), out[2:])
    assert not torch.equal(dropout(x, 0.3, seeds, 3), out)


def test_shares_and_neighbours() -> None:
    """The rate within five sigma; neighbouring columns, positions, rows and sites independent within five sigma."""
    rate, seeds = 0.1, torch.arange(8)
    masks = torch.stack([dropout(torch.ones(8, 128, 64), rate, seeds, site) != 0 for site in (0, 1)]).double()
    count = masks.numel()
    assert abs(float(masks.mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / count) ** 0.5
    noise = (masks - (1 - rate)) / (rate * (1 - rate)) ** 0.5
    for dim in range(4):
        first, second = noise.narrow(dim, 0, noise.shape[dim] - 1), noise.narrow(dim, 1, noise.shape[dim] - 1)
        assert abs(float((first * second).mean())) < 5 / first.numel() ** 0.5, f"dimension {dim}"
    assert torch.equal(masks[0].bool()[:2, :3, :5], keep_mask(seeds[:2], 0, 3, 5, rate))


def test_losses_that_are_not_finite_are_not_counted() -> None:
    logits = torch.zeros(4, 5)
    logits[1, 2], logits[2, 3] = float("nan"), float("inf")
    sums = torch.zeros(2, 5, dtype=torch.int64)
    token_losses(logits, torch.tensor([0, 1, 4, 0]), sums)
    assert sums[1].tolist() == [2, 0, 0, 0, 0] and int(sums[0].count_nonzero()) == 1


def test_accumulators_do_not_depend_on_the_split() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(64, 9, generator=rng) * 9, torch.randint(9, (64,), generator=rng)
    whole, parts = (torch.zeros(2, 9, dtype=torch.int64) for _ in range(2))
    token_losses(logits, labels, whole)
    for part in torch.randperm(64, generator=rng).split(7):
        token_losses(logits[part], labels[part], parts)
    assert torch.equal(whole, parts)


def step(x: Tensor, weight: Tensor, bias: Tensor, seeds: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    x = dropout(x, 0.2, seeds, 0)
    inner = linear_gelu(x, torch.cat([weight, weight]).view(2, -1).expand(2, -1).repeat(8, 1), bias.repeat(2)[:16])
    inner = inner + geglu(torch.cat([inner, linear_gelu(x, weight.diag(), None)], -1))
    out = dropout_add_norm(inner, x, weight, bias, 1e-5, 0.2, seeds, 1)
    return token_losses(out.flatten(0, 1), labels, sums).sum()


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_they_compile_into_one_graph(compiler: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=rng) for size in ((2, 5, 16), (16,), (16,)))
    labels = torch.randint(16, (10,), generator=rng)
    found: list[list[Tensor]] = []
    calls: list[Callable[..., Tensor]] = [step, torch.compile(step, fullgraph=True, backend=compiler)]
    for call in calls:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        sums = torch.zeros(2, 16, dtype=torch.int64)
        loss = call(*leaves, torch.arange(2), labels, sums)
        found.append([loss, *torch.autograd.grad(loss, leaves), sums])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_against_finite_differences(asked: str) -> None:
    if asked == "triton":
        pytest.skip("needs float64, which the Triton kernels do not take")
    rng = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(2))
    seeds = torch.arange(2)
    torch.autograd.gradcheck(lambda *t: dropout_add_norm(*t, 1e-5, 0.3, seeds, 1), (x, residual, weight, bias))
    torch.autograd.gradcheck(lambda t: dropout(t, 0.3, seeds, 1), (x,))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dropout(torch.zeros(2, 3), 0.1, torch.arange(2), 0), r"\(2, 3\)"),
        (lambda: dropout(torch.zeros(2, 3, 4), 1.0, torch.arange(2), 0), "below 1"),
        (lambda: dropout(torch.zeros(2, 3, 4), 0.1, torch.arange(3), 0), r"int64 \(2,\)"),
        (lambda: dropout_add_norm(*[torch.zeros(2, 3, 4)] * 2, torch.ones(4), torch.ones(3), 1e-5), r"\(3,\)"),
        (lambda: geglu(torch.zeros(2, 3)), r"\(2, 3\)"),
        (lambda: geglu(torch.zeros(2, 4).long()), "int64"),
        (lambda: geglu(torch.tensor(0.0)), r"\(\)"),
        (lambda: token_losses(torch.zeros(2, 3, 4), torch.zeros(2).long()), r"\(2, 3, 4\)"),
        (lambda: token_losses(torch.zeros(2, 3), torch.zeros(3).long()), r"\(3,\)"),
        (lambda: token_losses(torch.zeros(2, 3), torch.tensor([0, 3])), "0..3"),
        (lambda: token_losses(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, 3)), "accumulators"),
    ],
)
def test_bad_input_is_refused_with_its_shapes(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()

"""Rotary position embedding in torch, and in Triton under its interpreter."""

import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import ModernBertConfig
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding, apply_rotary_pos_emb

from elementwise_checks import check_rotate
from sctd_kernels import rotary_table, rotate

pytestmark = pytest.mark.usefixtures("asked")

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
TABLE = rotary_table(16, 8, 100.0, "cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_table_is_its_definition() -> None:
    table = rotary_table(50, 6, 1000.0, "cpu")
    assert table.shape == (2, 50, 3) and table.dtype == FLOAT
    angle = torch.tensor([[place * 1000.0 ** (-2 * i / 6) for i in range(3)] for place in range(50)]).double()
    torch.testing.assert_close(table.double(), torch.stack([angle.cos(), angle.sin()]), rtol=0, atol=5e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 20).map(lambda half: 2 * half)),
    st.sampled_from([FLOAT, BF16, HALF]),
    st.booleans(),
)
def test_rotation_is_complex_multiplication(shape: tuple[int, int, int, int], dtype: torch.dtype, placed: bool) -> None:
    check_rotate(shape, dtype, placed)


@pytest.mark.parametrize("shape", [(2, 300, 12, 64), (0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)])
def test_several_programs_and_none(shape: tuple[int, int, int, int]) -> None:
    """The first takes four programs of the interpreter's."""
    check_rotate(shape, FLOAT, True)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_it_is_what_transformers_does(kind: str, dtype: torch.dtype) -> None:
    """At the first and the last of 8192 places, for both of ModernBERT's bases."""
    config = ModernBertConfig()
    width = config.hidden_size // config.num_attention_heads
    table = rotary_table(8192, width, config.rope_parameters[kind]["rope_theta"], "cpu")
    place = torch.cat([torch.arange(20), torch.arange(8172, 8192)])[None]
    q, k = (numbers(1, 40, 3, width, seed=seed).to(dtype) for seed in (0, 1))
    cosine, sine = ModernBertRotaryEmbedding(config)(q.float(), place, kind)
    torch.testing.assert_close(table[:, place].repeat(1, 1, 1, 2), torch.stack([cosine, sine]), rtol=0, atol=1e-6)
    wanted = apply_rotary_pos_emb(q, k, cosine, sine, unsqueeze_dim=2)
    tolerance = 1e-6 if dtype == FLOAT else 1e-2
    for x, other in zip((q, k), wanted, strict=True):
        torch.testing.assert_close(rotate(x, table, place), other, rtol=tolerance, atol=tolerance)


def test_places_in_order_are_no_places() -> None:
    found = []
    for place in (None, torch.arange(9).expand(2, 9)):
        x = numbers(2, 9, 3, 8).requires_grad_()
        out = rotate(x, TABLE, place)
        found.append((out, *torch.autograd.grad(out.square().sum() + out.sum(), x)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_norms_stay_and_place_zero_does_nothing() -> None:
    x = numbers(2, 16, 3, 8)
    out = rotate(x, TABLE)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[:, 0], x[:, 0]) and not torch.isclose(out[:, 1:], x[:, 1:]).all(-1).any()


def test_products_depend_on_distances_alone() -> None:
    """One query and one key at every pair of places: equal along the diagonals, and on no two of them."""
    q, k = (rotate(numbers(8, seed=seed).expand(1, 16, 1, 8), TABLE)[0, :, 0] for seed in (0, 1))
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-5, atol=1e-5)
    distances = torch.cat([scores[0].flip(0), scores[1:, 0]])
    assert distances.sort().values.diff().min() > 1e-4


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (3, 1, 2, 0), (1, 0, 3, 2)])
def test_any_strides(axes: tuple[int, int, int, int]) -> None:
    """Transposed states, gradients and places, with the last dimension contiguous or not."""
    x = numbers(8, 8, 8, 8).permute(axes).requires_grad_()
    place = torch.arange(64).view(8, 8).T % 16
    found = []
    for given_x, at in ((x, place), (x.contiguous(), place.contiguous())):
        out = rotate(given_x, TABLE, at)
        assert out.is_contiguous()
        loss = (out.permute(axes) * torch.arange(8.0)[:, None]).sum()
        found.append((out, *torch.autograd.grad(loss, x)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_gradients_against_finite_differences(asked: str) -> None:
    if asked == "triton":
        pytest.skip("needs float64, which the Triton kernels do not take")
    x = numbers(2, 3, 2, 8).double().requires_grad_()
    for place in (None, torch.tensor([[5, 0, 15], [1, 1, 2]])):
        torch.autograd.gradcheck(lambda t, place=place: rotate(t, TABLE, place), (x,))


def test_no_activation_is_saved() -> None:
    place = torch.zeros(2, 3, dtype=torch.int64)
    out = rotate(numbers(2, 3, 2, 8).requires_grad_(), TABLE, place)
    assert [saved.data_ptr() for saved in out.grad_fn.saved_tensors] == [TABLE.data_ptr(), place.data_ptr()]


def attend(fused: Tensor, table: Tensor, place: Tensor) -> Tensor:
    q, k, v = fused.unflatten(-1, (3, 2, 8)).unbind(2)
    scores = torch.einsum("bthd,bshd->bhts", rotate(q, table, place), rotate(k, table))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_it_compiles_into_one_graph(compiler: str) -> None:
    if compiler == "inductor" and shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    fused, place = numbers(2, 5, 48), torch.tensor([[0, 3, 4, 9, 15], [1, 2, 3, 4, 5]])
    found = []
    torch._dynamo.reset()
    for call in (attend, torch.compile(attend, fullgraph=True, backend=compiler)):
        x = fused.clone().requires_grad_()
        out = call(x, TABLE, place)
        found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


X = torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rotary_table(4, 7, 100.0, "cpu"), "even, got 7"),
        (lambda: rotate(X[0], TABLE), r"\(3, 4, 8\)"),
        (lambda: rotate(X[..., 1:], TABLE), r"even d, got torch.float32 \(2, 3, 4, 7\)"),
        (lambda: rotate(X.long(), TABLE), "int64"),
        (
            lambda: rotate(X[..., 2:], TABLE),
            r"table must be float32 \(2, 16, 3\) on cpu .* got torch.float32 \(2, 16, 4\)",
        ),
        (lambda: rotate(X, TABLE[0]), r"\(16, 4\)"),
        (lambda: rotate(X, TABLE.double()), "table must be .* got torch.float64"),
        (lambda: rotate(X, TABLE.to("meta")), "table must be .* got .* on meta"),
        (lambda: rotate(X, TABLE[:, :2]), "longer than table"),
        (lambda: rotate(X, TABLE, torch.zeros(2, 4).long()), r"places must be .* got torch.int64 \(2, 4\)"),
        (lambda: rotate(X, TABLE, torch.zeros(2, 3)), "places must be .* got torch.float32"),
        (lambda: rotate(X, TABLE, torch.full((2, 3), 16)), r"16\.\.16, out of range 0\.\.15 of"),
        (lambda: rotate(X, TABLE, torch.full((2, 3), -1)), "-1..-1, out of range"),
    ],
)
def test_bad_input_is_refused_with_its_shapes(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()

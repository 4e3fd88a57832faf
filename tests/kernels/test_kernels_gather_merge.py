"""Gather and merge against torch.gather and torch.scatter, and their gradients against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sctd_kernels import Selection, gather, gather_rows, merge, select

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make(rows: int, length: int, keep: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Hidden states, kept states and a selection."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, generator=rng).to(dtype)
    kept = torch.randn(rows, keep, width, generator=rng).to(dtype)
    scores = torch.randn(rows, length, generator=rng)
    return hidden, kept, select(scores, keep, torch.randint(2**62, (rows,), generator=rng))


def wide(index_BK: Tensor, width: int) -> Tensor:
    return index_BK[:, :, None].expand(-1, -1, width)


@settings(deadline=None, max_examples=120)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 33),
    width=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_forward_and_backward_equal_torch(rows: int, length: int, width: int, dtype: torch.dtype, data) -> None:
    keep = data.draw(st.integers(1, length))
    hidden, kept, selection = make(rows, length, keep, width, data.draw(st.integers(0, 1000)), dtype)
    index = wide(selection.kept_BK, width)
    results = []
    for own in (True, False):
        h, k = hidden.clone().requires_grad_(), kept.clone().requires_grad_()
        taken = gather(h, selection) if own else h.gather(1, index)
        merged = merge(h, k, selection) if own else h.scatter(1, index, k)
        weight = torch.arange(merged.numel()).view_as(merged).remainder(7).to(dtype)
        merged_grads = torch.autograd.grad((merged * weight).sum(), (h, k))
        (taken_grad,) = torch.autograd.grad((taken * weight[:, :keep]).sum(), h)
        results.append((taken, merged, *merged_grads, taken_grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("index_kind", ["ascending", "shuffled"])
def test_gather_rows_takes_positions_in_the_given_order(index_kind: str) -> None:
    hidden = torch.randn(3, 9, 4)
    index = torch.stack([torch.randperm(9)[:5] for _ in range(3)])
    index = index.sort(1).values if index_kind == "ascending" else index
    expected = torch.stack([torch.stack([hidden[b, s] for s in index[b].tolist()]) for b in range(3)])
    assert torch.equal(gather_rows(hidden, index), expected)


def test_merge_puts_each_row_in_its_place() -> None:
    """The contract in words: out[b, s] = kept[b, inverse[b, s]] where kept, else hidden[b, s]."""
    hidden, kept, selection = make(3, 11, 4, 2)
    out = merge(hidden, kept, selection)
    for b in range(3):
        for s in range(11):
            rank = int(selection.inverse_BS[b, s])
            assert torch.equal(out[b, s], kept[b, rank] if rank >= 0 else hidden[b, s])


def test_merge_undoes_gather() -> None:
    hidden, _, selection = make(4, 32, 16, 8)
    assert torch.equal(merge(hidden, gather(hidden, selection), selection), hidden)


def test_inputs_are_left_alone() -> None:
    hidden, kept, selection = make(2, 8, 4, 3)
    before = hidden.clone(), kept.clone()
    out = merge(hidden, kept, selection)
    out.add_(1)
    gather(hidden, selection).add_(1)
    assert torch.equal(hidden, before[0]) and torch.equal(kept, before[1])


@pytest.mark.parametrize("dims", [(2, 0, 1), (1, 0, 2), (0, 2, 1)])
def test_any_memory_layout(dims: tuple[int, int, int]) -> None:
    hidden, kept, selection = make(3, 12, 5, 4)
    inverse = [dims.index(d) for d in range(3)]
    strided_hidden, strided_kept = (x.permute(dims).contiguous().permute(inverse) for x in (hidden, kept))
    grads = []
    for h, k in ((hidden, kept), (strided_hidden, strided_kept)):
        h, k = h.detach().requires_grad_(), k.detach().requires_grad_()
        out = merge(h, k, selection)
        both = out, gather(h, selection)
        # a transposed cotangent: strides of gradients differ from those of the outputs
        loss = (out.transpose(0, 2) * torch.arange(4.0)[:, None, None]).sum() + both[1].square().sum()
        grads.append((*both, *torch.autograd.grad(loss, (h, k))))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("length", "keep"), [(7, 3), (6, 6), (5, 1)])
def test_gradients_of_gather_and_merge_alone(length: int, keep: int) -> None:
    hidden, kept, selection = make(2, length, keep, 3, dtype=torch.float64)
    hidden.requires_grad_(), kept.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: gather(h, selection), (hidden,))
    assert torch.autograd.gradcheck(lambda h: gather_rows(h, selection.kept_BK.flip(1)), (hidden,))
    assert torch.autograd.gradcheck(lambda h, k: merge(h, k, selection), (hidden, kept))


def test_gradients_of_split_and_merge_with_another_consumer() -> None:
    """As in the model: hidden is gathered, is the context of the kept tokens, is merged, and has one use more."""
    hidden, _, selection = make(2, 7, 3, 4, dtype=torch.float64)
    hidden.requires_grad_()

    def middle(h: Tensor) -> tuple[Tensor, Tensor]:
        kept = gather(h, selection)
        mixed = torch.softmax(kept @ h.transpose(1, 2), dim=-1) @ h
        return merge(h, torch.tanh(kept * 1.5 + mixed), selection), h.square()

    assert torch.autograd.gradcheck(middle, (hidden,))


def test_where_gradients_go() -> None:
    hidden, kept, selection = make(2, 10, 4, 3)
    hidden.requires_grad_(), kept.requires_grad_()
    merge(hidden, kept, selection).sum().backward()
    is_kept = selection.inverse_BS >= 0
    assert torch.equal(hidden.grad, (~is_kept)[:, :, None].expand(-1, -1, 3).float())
    assert torch.equal(kept.grad, torch.ones(2, 4, 3))


MISFITS = [
    (torch.zeros(2, 8, 3), torch.zeros(3, 4, dtype=torch.long)),
    (torch.zeros(2, 8), torch.zeros(2, 4, dtype=torch.long)),
    (torch.zeros(2, 8, 3), torch.zeros(4, dtype=torch.long)),
]


@pytest.mark.parametrize(("hidden", "index"), MISFITS)
def test_gather_refuses_misfits_with_their_shapes(hidden: Tensor, index: Tensor) -> None:
    with pytest.raises(ValueError, match="gather") as caught:
        gather_rows(hidden, index)
    assert str(tuple(hidden.shape)) in str(caught.value) and str(tuple(index.shape)) in str(caught.value)


def chosen(rows: int = 2, length: int = 8, keep: int = 4) -> Selection:
    return select(torch.zeros(rows, length), keep, torch.arange(rows))


@pytest.mark.parametrize(
    ("hidden", "kept", "selection"),
    [
        (torch.zeros(2, 8, 3), torch.zeros(2, 5, 3), chosen()),
        (torch.zeros(2, 8, 3), torch.zeros(2, 4, 2), chosen()),
        (torch.zeros(2, 9, 3), torch.zeros(2, 4, 3), chosen()),
        (torch.zeros(1, 8, 3), torch.zeros(1, 4, 3), chosen()),
        (torch.zeros(2, 8, 3), torch.zeros(2, 4), chosen()),
        (torch.zeros(2, 8), torch.zeros(2, 4), chosen()),
    ],
)
def test_merge_refuses_misfits_with_their_shapes(hidden: Tensor, kept: Tensor, selection: Selection) -> None:
    with pytest.raises(ValueError, match="merge") as caught:
        merge(hidden, kept, selection)
    for shape in (hidden.shape, kept.shape, selection.kept_BK.shape):
        assert str(tuple(shape)) in str(caught.value), str(caught.value)


def test_merge_refuses_mixed_dtypes() -> None:
    with pytest.raises(ValueError, match=r"merge.*float32.*bfloat16"):
        merge(torch.zeros(2, 8, 3), torch.zeros(2, 4, 3, dtype=torch.bfloat16), chosen())

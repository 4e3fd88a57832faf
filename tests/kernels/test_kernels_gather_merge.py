"""Gather and merge against torch.gather and torch.scatter, and their gradients against finite differences."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_checks import check_moves, numbers, random_selection
from sctd_kernels import Selection, gather, gather_rows, merge, select, split

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make(rows: int, length: int, keep: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Hidden states, kept states and a selection."""
    hidden = numbers(rows, length, width, seed=seed, dtype=dtype)
    kept = numbers(rows, keep, width, seed=seed + 1, dtype=dtype)
    return hidden, kept, random_selection(rows, length, keep, seed)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 33),
    width=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_forward_and_backward_equal_torch(rows: int, length: int, width: int, dtype: torch.dtype, data) -> None:
    keep = data.draw(st.integers(1, length))
    check_moves(rows, length, keep, width, dtype, seed=data.draw(st.integers(0, 1000)))


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


def test_the_rest_of_a_split_is_no_copy() -> None:
    hidden, _, selection = make(2, 8, 4, 3)
    _, rest = split(hidden, selection)
    assert rest.data_ptr() == hidden.data_ptr() and torch.equal(rest, hidden)
    hidden.requires_grad_()
    kept, rest = split(hidden, selection)
    assert kept.grad_fn is rest.grad_fn, "two nodes would add up their gradients in a pass of its own"


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
    assert torch.autograd.gradcheck(lambda h: split(h, selection), (hidden,))
    assert torch.autograd.gradcheck(lambda h: split(h, selection)[0], (hidden,))
    assert torch.autograd.gradcheck(lambda h: split(h, selection)[1], (hidden,))
    assert torch.autograd.gradcheck(lambda h, k: merge(h, k, selection), (hidden, kept))


@pytest.mark.parametrize("one_node", [True, False])
def test_gradients_of_split_and_merge_with_another_consumer(one_node: bool) -> None:
    """As in the model: hidden is split, is the context of the kept tokens, is merged, and has one use more."""
    hidden, _, selection = make(2, 7, 3, 4, dtype=torch.float64)
    hidden.requires_grad_()

    def middle(h: Tensor) -> tuple[Tensor, Tensor]:
        kept, rest = split(h, selection) if one_node else (gather(h, selection), h)
        mixed = torch.softmax(kept @ h.transpose(1, 2), dim=-1) @ h
        return merge(rest, torch.tanh(kept * 1.5 + mixed), selection), h.square()

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
    (torch.zeros(2, 8, 3), torch.zeros(2, 4, dtype=torch.int32)),
    (torch.zeros(2, 8, 3), torch.zeros(2, 4, dtype=torch.long, device="meta")),
    (torch.zeros(2, 8, 3), torch.full((2, 4), 8)),
    (torch.zeros(2, 8, 3), torch.full((2, 4), -1)),
]


@pytest.mark.parametrize(("hidden", "index"), MISFITS)
def test_gather_refuses_misfits_with_their_shapes(hidden: Tensor, index: Tensor) -> None:
    with pytest.raises(ValueError, match="gather") as caught:
        gather_rows(hidden, index)
    said = str(caught.value)
    assert str(tuple(hidden.shape)) in said and (str(tuple(index.shape)) in said or "out of range" in said)


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


@pytest.mark.parametrize("take", [gather, split])
@pytest.mark.parametrize(
    ("hidden", "selection"),
    [(torch.zeros(2, 9, 3), chosen()), (torch.zeros(1, 8, 3), chosen()), (torch.zeros(2, 8), chosen())],
)
def test_split_and_gather_refuse_misfits(take: Any, hidden: Tensor, selection: Selection) -> None:
    with pytest.raises(ValueError, match=take.__name__) as caught:
        take(hidden, selection)
    assert str(tuple(hidden.shape)) in str(caught.value) and "(2, 4) out of 8" in str(caught.value)


@pytest.mark.parametrize("take", [gather, split])
def test_split_and_gather_refuse_another_device(take: Any) -> None:
    with pytest.raises(ValueError, match="meta.*cpu"):
        take(torch.zeros(2, 8, 3, device="meta"), chosen())


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0)])
def test_nothing_to_move(shape: tuple[int, int, int]) -> None:
    hidden = torch.zeros(shape, requires_grad=True)
    selection = chosen(rows=shape[0])
    kept, rest = split(hidden, selection)
    merge(rest, kept, selection).sum().backward()
    assert kept.shape == (shape[0], 4, shape[2]) and hidden.grad is not None and hidden.grad.shape == shape

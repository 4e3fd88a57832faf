"""Take the kept rows out of a sequence, and put them back.

Backends bring four raw moves (see `reference.py`); their derivatives are defined here, once. Each function has the
right gradient by itself, whatever else its input feeds.

Legend: B rows, S positions a row, K kept positions a row, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from sctd_kernels.dispatch import Operation, require_range, say
from sctd_kernels.gather_merge import reference
from sctd_kernels.select import Selection

__all__ = ["gather", "gather_rows", "merge", "split"]

GATHER = Operation(
    reference.gather,
    lambda hidden_BSD, index_BK: hidden_BSD.new_empty(*index_BK.shape, hidden_BSD.shape[2]),
    has_cuda=True,
)
SPLIT_BACKWARD = Operation(
    reference.split_backward,
    lambda grad_kept_BKD, _rest, _kept, inverse_BS: grad_kept_BKD.new_empty(*inverse_BS.shape, grad_kept_BKD.shape[2]),
    has_cuda=True,
)
MERGE = Operation(reference.merge, has_cuda=True)
MERGE_BACKWARD = Operation(
    reference.merge_backward,
    lambda grad_BSD, kept_BK, _inverse: (
        grad_BSD.new_empty(grad_BSD.shape),
        grad_BSD.new_empty(*kept_BK.shape, grad_BSD.shape[2]),
    ),
    has_cuda=True,
)


def gather_rows(hidden_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """States at the given positions: (B, S, D), int64 (B, K) with distinct entries in a row -> (B, K, D).

    Raises:
        ValueError: shapes or dtypes that do not fit; on CPUs also positions out of range.
    """
    fits = hidden_BSD.dim() == 3 and index_BK.dim() == 2 and hidden_BSD.shape[0] == index_BK.shape[0]
    if not fits or index_BK.dtype != torch.int64 or index_BK.device != hidden_BSD.device:
        raise ValueError(f"gather: hidden {say(hidden_BSD)} does not fit index {say(index_BK)}")
    require_range("gather: positions", index_BK, hidden_BSD, 1)
    return _Gather.apply(hidden_BSD, index_BK, None)


def split(hidden_BSD: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """States of the kept positions (B, K, D), and `hidden_BSD` itself (a view) for the merge to fill up from.

    One node of the graph instead of two: the gradients of both results are added as they are put in place.

    Raises:
        ValueError: shapes or devices that do not fit.
    """
    _check("split", hidden_BSD, selection)
    return _Split.apply(hidden_BSD, selection.kept_BK, selection.inverse_BS)


def gather(hidden_BSD: Tensor, selection: Selection) -> Tensor:
    """States of the kept positions: (B, S, D) -> (B, K, D), the first half of `split`."""
    _check("gather", hidden_BSD, selection)
    return _Gather.apply(hidden_BSD, selection.kept_BK, selection.inverse_BS)


def merge(hidden_BSD: Tensor, kept_BKD: Tensor, selection: Selection) -> Tensor:
    """`hidden_BSD` with its kept positions replaced by `kept_BKD`: out[b, s] = kept[b, inverse[b, s]] or hidden[b, s].

    The gradient of a kept position flows to `kept_BKD` alone, that of a dropped one to `hidden_BSD` alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check("merge", hidden_BSD, selection, kept_BKD)
    return _Merge.apply(hidden_BSD, kept_BKD, selection.kept_BK, selection.inverse_BS)


def _check(name: str, hidden_BSD: Tensor, selection: Selection, kept_BKD: Tensor | None = None) -> None:
    fits = hidden_BSD.dim() == 3 and selection.inverse_BS.shape == hidden_BSD.shape[:2]
    fits = fits and selection.inverse_BS.device == hidden_BSD.device
    said = f"{name}: hidden {say(hidden_BSD)}"
    if kept_BKD is not None:
        fits = fits and kept_BKD.shape == (*selection.kept_BK.shape, hidden_BSD.shape[2])
        fits = fits and kept_BKD.dtype == hidden_BSD.dtype and kept_BKD.device == hidden_BSD.device
        said += f", kept {say(kept_BKD)}"
    if not fits:
        chosen, length = tuple(selection.kept_BK.shape), selection.inverse_BS.shape[-1]
        raise ValueError(
            f"{said} and a selection of {chosen} out of {length} positions on {selection.kept_BK.device} do not fit"
        )


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(kept_BK, inverse_BS)
        ctx.set_materialize_grads(False)
        return GATHER(hidden_BSD, kept_BK), hidden_BSD.view_as(hidden_BSD)

    @staticmethod
    def backward(ctx: Any, grad_kept_BKD: Tensor | None, grad_rest_BSD: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_kept_BKD is None:
            return grad_rest_BSD, None, None
        return SPLIT_BACKWARD(grad_kept_BKD, grad_rest_BSD, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, index_BK: Tensor, inverse_BS: Tensor | None) -> Tensor:
        ctx.save_for_backward(index_BK, inverse_BS)
        ctx.length = hidden_BSD.shape[1]
        return GATHER(hidden_BSD, index_BK)

    @staticmethod
    def backward(ctx: Any, grad_BKD: Tensor) -> tuple[Tensor, None, None]:
        index_BK, inverse_BS = ctx.saved_tensors
        if inverse_BS is None:
            rank_BK = torch.arange(index_BK.shape[1], device=index_BK.device).expand_as(index_BK)
            inverse_BS = index_BK.new_full((len(index_BK), ctx.length), -1).scatter_(1, index_BK, rank_BK)
        return SPLIT_BACKWARD(grad_BKD, None, index_BK, inverse_BS), None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, kept_BKD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
        ctx.save_for_backward(kept_BK, inverse_BS)
        return MERGE(hidden_BSD, kept_BKD, kept_BK, inverse_BS)

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_BSD, grad_kept_BKD = MERGE_BACKWARD(grad_BSD, *ctx.saved_tensors)
        return grad_hidden_BSD, grad_kept_BKD, None, None

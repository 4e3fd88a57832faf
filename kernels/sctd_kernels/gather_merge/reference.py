"""Gather and merge in plain torch, as whole-row copies.

Both directions move rows of D contiguous numbers by a flat row index. The generic `torch.gather`/`scatter` would need
an index as large as the data and a scatter-add backward; the positions of a row are distinct, so copies suffice.
"""

from typing import Any

import torch
from torch import Tensor


def _flat(index_BK: Tensor, length: int) -> Tensor:
    rows = torch.arange(index_BK.shape[0], device=index_BK.device)[:, None]
    return (index_BK + rows * length).reshape(-1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, index_BK: Tensor) -> Tensor:
        batch, length, width = hidden_BSD.shape
        flat = _flat(index_BK, length)
        ctx.save_for_backward(flat)
        ctx.shape = hidden_BSD.shape
        return hidden_BSD.reshape(-1, width).index_select(0, flat).view(batch, -1, width)

    @staticmethod
    def backward(ctx: Any, grad_BKD: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        batch, length, width = ctx.shape
        grad = grad_BKD.new_zeros(batch * length, width)
        grad.index_copy_(0, flat, grad_BKD.reshape(-1, width))
        return grad.view(batch, length, width), None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, kept_BKD: Tensor, index_BK: Tensor) -> Tensor:
        batch, length, width = hidden_BSD.shape
        flat = _flat(index_BK, length)
        ctx.save_for_backward(flat)
        out = hidden_BSD.reshape(-1, width).clone()
        return out.index_copy_(0, flat, kept_BKD.reshape(-1, width)).view(batch, length, width)

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, Tensor, None]:
        (flat,) = ctx.saved_tensors
        batch, length, width = grad_BSD.shape
        rows = grad_BSD.reshape(-1, width)
        grad_kept = rows.index_select(0, flat).view(batch, -1, width)
        return rows.clone().index_fill_(0, flat, 0).view(batch, length, width), grad_kept, None


def gather(hidden_BSD: Tensor, index_BK: Tensor) -> Tensor:
    return _Gather.apply(hidden_BSD, index_BK)


def merge(hidden_BSD: Tensor, kept_BKD: Tensor, index_BK: Tensor) -> Tensor:
    return _Merge.apply(hidden_BSD, kept_BKD, index_BK)

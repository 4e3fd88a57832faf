"""Cross-entropy of predicted tokens that hands each loss to per-token accumulators as it is computed.

Legend: N predicted positions of a batch, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from sctd_kernels.cross_entropy import reference
from sctd_kernels.cross_entropy.reference import FIXED_POINT, MAX_LOSS
from sctd_kernels.dispatch import Operation, require, require_range, say

__all__ = ["FIXED_POINT", "MAX_LOSS", "token_losses"]

TOKEN_LOSSES = Operation(
    reference.token_losses,
    lambda logits_NV, *_: tuple(logits_NV.new_empty(len(logits_NV), dtype=torch.float32) for _ in range(2)),
    mutates=("sum_count_2V",),
    strided=True,  # a contiguous copy of the accumulators would be lost
)
TOKEN_LOSSES_BACKWARD = Operation(reference.token_losses_backward)


def token_losses(logits_NV: Tensor, labels_N: Tensor, sum_count_2V: Tensor | None = None) -> Tensor:
    """Cross-entropy of each position in nats, computed in float32: (N, V), int64 (N,) -> float32 (N,).

    Args:
        sum_count_2V: int64 accumulators, or None. Row 0 gets each finite loss, in fixed point (`FIXED_POINT`), at its
            label; row 1 counts them. Integer sums do not depend on their order: the result is the same, bit for bit,
            on every device whose losses are, and for every split into micro-batches and ranks.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on CPUs also labels out of range.
    """
    if logits_NV.dim() != 2 or not logits_NV.dtype.is_floating_point:
        raise ValueError(f"token_losses: logits must be floating (N, V), got {say(logits_NV)}")
    require("token_losses: labels", labels_N, logits_NV.shape[:1], (torch.int64,), logits_NV)
    if sum_count_2V is not None:
        require("token_losses: accumulators", sum_count_2V, (2, logits_NV.shape[1]), (torch.int64,), logits_NV)
    require_range("token_losses: labels", labels_N, logits_NV, 1)
    return _TokenLosses.apply(logits_NV, labels_N, sum_count_2V)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, sum_count_2V: Tensor | None) -> Tensor:
        losses_N, normaliser_N = TOKEN_LOSSES(logits_NV, labels_N, sum_count_2V)
        ctx.save_for_backward(logits_NV, labels_N, normaliser_N)
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        return TOKEN_LOSSES_BACKWARD(*ctx.saved_tensors, grad_N), None, None

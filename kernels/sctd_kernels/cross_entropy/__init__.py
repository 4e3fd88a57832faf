"""Cross-entropy of predicted tokens that hands each loss to per-token accumulators as it is computed.

Legend: N predicted positions of a batch, V vocabulary.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sctd_kernels.cross_entropy import reference
from sctd_kernels.cross_entropy.reference import FIXED_POINT, MAX_LOSS
from sctd_kernels.dispatch import backend

__all__ = ["FIXED_POINT", "MAX_LOSS", "token_losses"]


def _ops(device_type: str) -> ModuleType:
    """The module of raw operations for tensors on devices of this type."""
    if backend(device_type) == "torch":
        return reference
    # A row of logits is one stream over memory, where CUDA C++ has nothing over Triton.
    from sctd_kernels.cross_entropy import triton

    return triton


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
        raise ValueError(f"token_losses: logits must be floating (N, V), got {_say(logits_NV)}")
    if labels_N.shape != logits_NV.shape[:1] or labels_N.dtype != torch.int64 or labels_N.device != logits_NV.device:
        raise ValueError(f"token_losses: labels {_say(labels_N)} do not fit logits {_say(logits_NV)}")
    if sum_count_2V is not None and (
        sum_count_2V.shape != (2, logits_NV.shape[1])
        or sum_count_2V.dtype != torch.int64
        or sum_count_2V.device != logits_NV.device
    ):
        raise ValueError(f"token_losses: accumulators {_say(sum_count_2V)} do not fit logits {_say(logits_NV)}")
    if logits_NV.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels_N):
        lowest, highest = (int(value) for value in labels_N.aminmax())
        if lowest < 0 or highest >= logits_NV.shape[1]:
            raise ValueError(f"token_losses: labels {lowest}..{highest} are out of range for logits {_say(logits_NV)}")
    return _TokenLosses.apply(logits_NV, labels_N, sum_count_2V)


def _say(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, sum_count_2V: Tensor | None) -> Tensor:
        losses_N, normaliser_N = _ops(logits_NV.device.type).token_losses(logits_NV, labels_N, sum_count_2V)
        ctx.save_for_backward(logits_NV, labels_N, normaliser_N)
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, labels_N, normaliser_N = ctx.saved_tensors
        ops = _ops(logits_NV.device.type)
        return ops.token_losses_backward(grad_N, logits_NV, labels_N, normaliser_N), None, None

"""What stands between the matrix products of a layer: dropout, residual, LayerNorm and GELU, forward and backward.

Dropout here is no stream of random numbers: whether an element is dropped is a hash of (row seed, site, position,
column). Every backend and every device drops the same elements, whatever the batch is split into, and the backward can
work the mask out again. One hash serves two neighbouring columns, with 16 bits each: a rate is a multiple of 2**-16.

Legend: B rows, T positions a row, D columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sctd_kernels.dispatch import Operation, backend, require, say
from sctd_kernels.elementwise import reference

__all__ = ["dropout", "dropout_add_norm", "geglu", "linear_gelu"]

_LEVELS = 1 << 16


def _empty_add_norm(x_BTD: Tensor, residual_BTD: Tensor, *_: Any) -> list[Tensor]:
    states = [residual_BTD.new_empty(x_BTD.shape) for _ in range(2)]
    return states + [residual_BTD.new_empty(*x_BTD.shape[:2], 1, dtype=torch.float32) for _ in range(2)]


def _empty_add_norm_backward(grad_BTD: Tensor, weight_D: Tensor, *others: Any) -> list[Tensor]:
    """Zeros for weight and bias: where there are no rows, no kernel runs."""
    of_x = grad_BTD.new_empty(grad_BTD.shape, dtype=others[-1])
    return [of_x, grad_BTD.new_empty(grad_BTD.shape), torch.zeros_like(weight_D), torch.zeros_like(weight_D)]


DROPOUT = Operation(reference.dropout)
ADD_NORM = Operation(reference.add_norm, _empty_add_norm)
ADD_NORM_BACKWARD = Operation(reference.add_norm_backward, _empty_add_norm_backward)
BIAS_GELU = Operation(reference.bias_gelu)
GEGLU = Operation(
    reference.geglu,
    lambda x, grad: x.new_empty(x.shape) if grad is not None else x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
)


def _threshold(rate: float) -> int:
    """Of 2**16 levels, how many are dropped."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: the rate must be at least 0 and below 1, got {rate}")
    return round(rate * _LEVELS)


def _check(name: str, x_BTD: Tensor, row_seed_B: Tensor | None) -> None:
    if x_BTD.dim() != 3 or not x_BTD.dtype.is_floating_point:
        raise ValueError(f"{name}: x must be floating (B, T, D), got {say(x_BTD)}")
    if row_seed_B is not None:
        require(f"{name}: row_seed", row_seed_B, x_BTD.shape[:1], (torch.int64,), x_BTD)


def dropout(x_BTD: Tensor, rate: float, row_seed_B: Tensor | None, site: int) -> Tensor:
    """Zero a share of the elements and scale the others up: (B, T, D) -> (B, T, D).

    Args:
        rate: share that is dropped, rounded to a multiple of 2**-16.
        row_seed_B: int64, one seed per row; None: nothing is dropped.
        site: number of this place in the network; other sites of the same rows drop other elements.

    Raises:
        ValueError: shapes, dtypes or a rate that do not fit.
    """
    _check("dropout", x_BTD, row_seed_B)
    threshold = _threshold(rate)
    return x_BTD if row_seed_B is None or threshold == 0 else _Dropout.apply(x_BTD, row_seed_B, site, threshold)


def dropout_add_norm(
    x_BTD: Tensor,
    residual_BTD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    rate: float = 0.0,
    row_seed_B: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension; the result has the dtype of the residual.

    Arguments of the dropout are those of `dropout`.

    Raises:
        ValueError: shapes, dtypes or a rate that do not fit.
    """
    _check("dropout_add_norm", x_BTD, row_seed_B)
    width = x_BTD.shape[-1:]
    if residual_BTD.shape != x_BTD.shape or weight_D.shape != width or bias_D.shape != width:
        raise ValueError(
            f"dropout_add_norm: x {tuple(x_BTD.shape)}, residual {tuple(residual_BTD.shape)}, weight "
            f"{tuple(weight_D.shape)} and bias {tuple(bias_D.shape)} do not fit"
        )
    threshold = _threshold(rate) if row_seed_B is not None else 0
    if threshold == 0 and backend(x_BTD.device.type) == "torch":
        # torch's own two operations, which its compiler and autograd know best.
        return F.layer_norm(residual_BTD + x_BTD, tuple(width), weight_D, bias_D, eps).to(residual_BTD.dtype)
    return _DropoutAddNorm.apply(x_BTD, residual_BTD, weight_D, bias_D, eps, row_seed_B, site, threshold)


def linear_gelu(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """GELU(x @ weight.T + bias), GELU exact (with erf): (..., D) -> (..., E)."""
    if bias_E is None or backend(x.device.type) == "torch":
        return F.gelu(F.linear(x, weight_ED, bias_E))
    return _BiasGelu.apply(F.linear(x, weight_ED), bias_E)


def geglu(x: Tensor) -> Tensor:
    """GELU of the first half times the second half, GELU exact (with erf): (..., 2E) -> (..., E).

    Raises:
        ValueError: x is not floating, or its width is odd.
    """
    if not x.dim() or not x.dtype.is_floating_point or x.shape[-1] % 2:
        raise ValueError(f"geglu: x must be floating (..., 2E), got {say(x)}")
    if backend(x.device.type) == "torch":
        return reference.geglu(x, None)
    return _Geglu.apply(x)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, row_seed_B: Tensor, site: int, threshold: int) -> Tensor:
        ctx.save_for_backward(row_seed_B)
        ctx.drops = site, threshold
        return DROPOUT(x_BTD, row_seed_B, site, threshold)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        return DROPOUT(grad_BTD, *ctx.saved_tensors, *ctx.drops), None, None, None


class _DropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        residual_BTD: Tensor,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
        row_seed_B: Tensor | None,
        site: int,
        threshold: int,
    ) -> Tensor:
        out, *saved = ADD_NORM(x_BTD, residual_BTD, weight_D, bias_D, eps, row_seed_B, site, threshold)
        ctx.save_for_backward(weight_D, row_seed_B, *saved)
        ctx.site, ctx.threshold, ctx.x_dtype = site, threshold, x_BTD.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        weight_D, row_seed_B, *saved = ctx.saved_tensors
        grads = ADD_NORM_BACKWARD(grad_BTD, weight_D, row_seed_B, saved, ctx.site, ctx.threshold, ctx.x_dtype)
        return *grads, None, None, None, None


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_E: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias_E)
        return BIAS_GELU(x, bias_E, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias_E = ctx.saved_tensors
        grad_x = BIAS_GELU(x, bias_E, grad)
        return grad_x, grad_x.flatten(0, -2).sum(0, dtype=torch.float32).to(bias_E.dtype)


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return GEGLU(x, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return GEGLU(*ctx.saved_tensors, grad)

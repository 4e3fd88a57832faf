"""Elementwise work in plain torch. Legend: B rows, T positions a row, R = B x T, D columns, W = D/2 rounded up."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sctd_kernels.hashing import hash_positions, mix_rows

_CHUNK = 512  # rows a pass, so that the passes over a chunk find it in a CPU's cache
_HALF = 1 << 15
_COLUMN = 0x9E3779B9


def _int32(unsigned: int) -> int:
    return unsigned - (1 << 32) if unsigned >= 1 << 31 else unsigned


def _xor_shift(x: Tensor, bits: int) -> None:
    x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))  # int32 shifts drag the sign along


def _keep_mask(key_R: Tensor, width: int, threshold: int) -> Tensor:
    """bool (R, D): the finaliser of MurmurHash3 on (row key xor column key), one hash for two columns."""
    columns = (width + 1) // 2
    column_W = (torch.arange(columns, device=key_R.device) * _COLUMN).to(torch.int32)
    x_RW = key_R[:, None] ^ column_W
    _xor_shift(x_RW, 16)
    x_RW.mul_(_int32(0x85EBCA6B))
    _xor_shift(x_RW, 13)
    x_RW.mul_(_int32(0xC2B2AE35))
    _xor_shift(x_RW, 16)
    return (x_RW.view(torch.int16) >= threshold - _HALF)[:, :width]


def _row_keys(row_seed_B: Tensor, site: int, length: int) -> Tensor:
    return hash_positions(mix_rows(row_seed_B, site), length).to(torch.int32).flatten()


def _scale(threshold: int) -> float:
    return 2 * _HALF / (2 * _HALF - threshold)


def _chunks(rows: int) -> list[slice]:
    step = max(1, rows) if torch.compiler.is_compiling() else _CHUNK
    return [slice(start, start + step) for start in range(0, rows, step)]


def dropout(x_BTD: Tensor, row_seed_B: Tensor, site: int, threshold: int) -> Tensor:
    rows, length, width = x_BTD.shape
    mask = _keep_mask(_row_keys(row_seed_B, site, length), width, threshold)
    return torch.where(mask.view(x_BTD.shape), x_BTD, 0.0) * _scale(threshold)


def add_norm(
    x_BTD: Tensor,
    residual_BTD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    row_seed_B: Tensor | None,
    site: int,
    threshold: int,
) -> list[Tensor]:
    """The normalised sum, then what the backward needs: the sum itself, mean, 1/deviation and the mask.

    Kernels return no mask: they work it out again.
    """
    assert row_seed_B is not None, "torch's own operations do without dropout"
    width, scale = x_BTD.shape[-1], _scale(threshold)
    x_RD, residual_RD = x_BTD.reshape(-1, width), residual_BTD.reshape(-1, width)
    key_R = _row_keys(row_seed_B, site, x_BTD.shape[1])
    sum_RD = torch.empty_like(residual_RD)
    mask_RD = torch.empty(residual_RD.shape, dtype=torch.bool, device=residual_RD.device)
    for part in _chunks(len(key_R)):
        mask_RD[part] = _keep_mask(key_R[part], width, threshold)
        sum_RD[part] = torch.add(residual_RD[part], torch.where(mask_RD[part], x_RD[part], 0.0), alpha=scale)
    sum_BTD = sum_RD.view(x_BTD.shape)
    out, mean, rstd = torch.native_layer_norm(sum_BTD, (width,), weight_D, bias_D, eps)
    return [out.to(residual_BTD.dtype), sum_BTD, mean, rstd, mask_RD.view(x_BTD.shape)]


def add_norm_backward(
    grad_BTD: Tensor,
    weight_D: Tensor,
    row_seed_B: Tensor | None,
    saved: Sequence[Tensor],
    site: int,
    threshold: int,
    x_dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of x, residual, weight and bias."""
    sum_BTD, mean, rstd, mask = saved
    width = (sum_BTD.shape[-1],)
    grad_sum, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_BTD.contiguous(), sum_BTD, width, mean, rstd, weight_D, weight_D, [True, True, True]
    )
    grad_x = torch.where(mask, grad_sum, 0.0).mul_(_scale(threshold)).to(x_dtype)
    return [grad_x, grad_sum, grad_weight, grad_bias]


def bias_gelu(x: Tensor, bias_E: Tensor, grad: Tensor | None) -> Tensor:
    """GELU of x + bias, or with `grad` the gradient of x."""
    x = x + bias_E
    return F.gelu(x) if grad is None else torch.ops.aten.gelu_backward(grad, x)


def geglu(x: Tensor, grad: Tensor | None) -> Tensor:
    """GELU of the first half of x times the second half, or with `grad` the gradient of x."""
    inner, gate = x.chunk(2, -1)
    if grad is None:
        return F.gelu(inner) * gate
    return torch.cat([torch.ops.aten.gelu_backward(grad * gate, inner), grad * F.gelu(inner)], -1)

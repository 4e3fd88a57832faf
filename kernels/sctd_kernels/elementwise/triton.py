"""Elementwise work as Triton kernels: each reads its inputs once and writes its results once.

Dropout masks are worked out from the row seeds, in the backward again: none is stored. Arithmetic is in float32. Sums
over rows (the gradients of weight and bias) are one partial sum a program, added in a fixed order: no atomics.

Legend: B rows, T positions a row, R = B x T, D columns, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.tiles import INTERPRETED, fmix32, own_rows

_MAX_WIDTH = 8192  # columns that one program holds
_PROGRAMS = 4  # for each multiprocessor


@triton.jit
def _is_kept(seed_ptr, row_R1, rows, column_1D, length, site, threshold):
    """The mask of `reference._keep_mask`: mixed row seed, then position, then column; one hash for two columns.

    `site` comes as `_drops` makes it.
    """
    seed_R1 = tl.load(seed_ptr + row_R1 // length, mask=row_R1 < rows, other=0)
    low_R1 = fmix32((seed_R1 ^ site).to(tl.uint32))
    high_R1 = fmix32((seed_R1 >> 32).to(tl.uint32) ^ low_R1)
    key_R1 = fmix32((row_R1 % length).to(tl.uint32) + ((high_R1 << 31) ^ low_R1))
    key_R1 = fmix32(key_R1 ^ (high_R1 >> 1))
    hash_RD = fmix32(key_R1 ^ (column_1D >> 1).to(tl.uint32) * 0x9E3779B9)
    lane_RD = (hash_RD >> ((column_1D & 1) * 16).to(tl.uint32)) & 0xFFFF
    return (lane_RD.to(tl.int32) ^ 0x8000) >= threshold


@triton.jit
def _dropout_kernel(
    x_ptr, seed_ptr, out_ptr, rows, length, width, site, threshold, scale, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    row_R1 = own_rows(ROWS)
    column_1D = tl.arange(0, BLOCK_D)[None, :]
    inside = (row_R1 < rows) & (column_1D < width)
    at = row_R1 * width + column_1D
    kept = _is_kept(seed_ptr, row_R1, rows, column_1D, length, site, threshold)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, tl.where(kept, x * scale, 0.0), mask=inside)


@triton.jit
def _add_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, length, width, site, threshold, scale, eps,
    DROPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row_R1 = own_rows(ROWS)
    column_1D = tl.arange(0, BLOCK_D)[None, :]
    in_row, in_column = row_R1 < rows, column_1D < width
    inside = in_row & in_column
    at = row_R1 * width + column_1D
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        x = tl.where(_is_kept(seed_ptr, row_R1, rows, column_1D, length, site, threshold), x * scale, 0.0)
    total = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32) + x
    tl.store(sum_ptr + at, total, mask=inside)
    total = total.to(sum_ptr.dtype.element_ty).to(tl.float32)  # what the backward will read
    mean = tl.sum(total, axis=1, keep_dims=True) / width
    centred = tl.where(inside, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / width + eps)
    weight = tl.load(weight_ptr + column_1D, mask=in_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column_1D, mask=in_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, centred * rstd * weight + bias, mask=inside)
    tl.store(mean_ptr + row_R1, mean, mask=in_row)
    tl.store(rstd_ptr + row_R1, rstd, mask=in_row)


@triton.jit
def _add_norm_backward_kernel(
    grad_ptr, sum_ptr, mean_ptr, rstd_ptr, weight_ptr, seed_ptr,
    grad_x_ptr, grad_residual_ptr, grad_weight_ptr, grad_bias_ptr,
    rows, length, width, site, threshold, scale, tiles,
    DROPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program p takes the tiles p, p + P, p + 2P ...; its sums over their rows are row p of the partial sums."""
    column_1D = tl.arange(0, BLOCK_D)[None, :]
    in_column = column_1D < width
    weight = tl.load(weight_ptr + column_1D, mask=in_column, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((1, BLOCK_D), dtype=tl.float32)
    grad_bias = tl.zeros((1, BLOCK_D), dtype=tl.float32)
    first, stride = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for number in range(0, tl.cdiv(tiles, stride)):
        row_R1 = ((first + number * stride) * ROWS + tl.arange(0, ROWS))[:, None]
        in_row = row_R1 < rows
        inside = in_row & in_column
        at = row_R1 * width + column_1D
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row_R1, mask=in_row, other=0.0)
        total = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normal = tl.where(inside, (total - tl.load(mean_ptr + row_R1, mask=in_row, other=0.0)) * rstd, 0.0)
        grad_weight += tl.sum(grad * normal, axis=0, keep_dims=True)
        grad_bias += tl.sum(grad, axis=0, keep_dims=True)
        grad = grad * weight
        mean_grad = tl.sum(grad, axis=1, keep_dims=True) / width
        mean_product = tl.sum(grad * normal, axis=1, keep_dims=True) / width
        grad = (grad - mean_grad - normal * mean_product) * rstd
        tl.store(grad_residual_ptr + at, grad, mask=inside)
        if DROPS:
            grad = tl.where(_is_kept(seed_ptr, row_R1, rows, column_1D, length, site, threshold), grad * scale, 0.0)
        tl.store(grad_x_ptr + at, grad, mask=inside)
    out = tl.program_id(0) * width + column_1D
    tl.store(grad_weight_ptr + out, grad_weight, mask=in_column)
    tl.store(grad_bias_ptr + out, grad_bias, mask=in_column)


@triton.jit
def _below(x):
    """The normal distribution up to x: GELU is x times this."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _slope(x, below):
    """The derivative of GELU."""
    return below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _bias_gelu_kernel(x_ptr, bias_ptr, grad_ptr, out_ptr, rows, width, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """GELU of x + bias, or with `grad` its derivative times that."""
    row_R1 = own_rows(ROWS)
    column_1D = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    in_column = column_1D < width
    inside = (row_R1 < rows) & in_column
    at = row_R1 * width + column_1D
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column_1D, mask=in_column, other=0.0).to(tl.float32)
    below = _below(x)
    if grad_ptr is None:
        out = x * below
    else:
        out = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * _slope(x, below)
    tl.store(out_ptr + at, out, mask=inside)


@triton.jit
def _geglu_kernel(x_ptr, grad_ptr, out_ptr, rows, width, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """GELU of the first `width` columns of x times the others, or with `grad` the gradients of both halves."""
    row_R1 = own_rows(ROWS)
    column_1D = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    inside = (row_R1 < rows) & (column_1D < width)
    at = row_R1 * 2 * width + column_1D
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    below = _below(x)
    if grad_ptr is None:
        tl.store(out_ptr + row_R1 * width + column_1D, x * below * gate, mask=inside)
    else:
        grad = tl.load(grad_ptr + row_R1 * width + column_1D, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, grad * gate * _slope(x, below), mask=inside)
        tl.store(out_ptr + at + width, grad * x * below, mask=inside)


def _drops(site: int, threshold: int) -> tuple[int, int, float]:
    """What `hashing.mix_rows` mixes into a row seed for this site; the threshold; the scale of what stays."""
    return (0x9E3779B9 * (site + 1)) & 0xFFFFFFFF, threshold, 65536 / (65536 - threshold)


def _tile(rows: int, width: int) -> tuple[int, dict[str, int]]:
    """How many tiles of whole rows there are, and how they are made."""
    if width > _MAX_WIDTH:
        raise ValueError(f"dropout and LayerNorm in Triton take up to {_MAX_WIDTH} columns, got {width}")
    block = triton.next_power_of_2(width)
    tile = min(triton.next_power_of_2(rows), max(1, (1 << 18) // block)) if INTERPRETED else max(1, 512 // block)
    return triton.cdiv(rows, tile), {"ROWS": tile, "BLOCK_D": block, "num_warps": max(1, min(8, tile * block // 256))}


def dropout(out_BTD: Tensor, x_BTD: Tensor, row_seed_B: Tensor, site: int, threshold: int) -> None:
    batch, length, width = x_BTD.shape
    tiles, options = _tile(batch * length, width)
    sizes = (batch * length, length, width)
    _dropout_kernel[(tiles,)](x_BTD, row_seed_B, out_BTD, *sizes, *_drops(site, threshold), **options)


def add_norm(
    results: list[Tensor],
    x_BTD: Tensor,
    residual_BTD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    row_seed_B: Tensor | None,
    site: int,
    threshold: int,
) -> None:
    """The normalised sum, then what the backward needs: the sum itself, mean and 1/deviation."""
    batch, length, width = x_BTD.shape
    tiles, options = _tile(batch * length, width)
    inputs = (x_BTD, residual_BTD, weight_D, bias_D, row_seed_B)
    numbers = (batch * length, length, width, *_drops(site, threshold), eps)
    _add_norm_kernel[(tiles,)](*inputs, *results, *numbers, DROPS=threshold > 0, **options)


def add_norm_backward(
    results: list[Tensor],
    grad_BTD: Tensor,
    weight_D: Tensor,
    row_seed_B: Tensor | None,
    saved: list[Tensor],
    site: int,
    threshold: int,
    x_dtype: torch.dtype,
) -> None:
    grad_x, grad_residual, grad_weight, grad_bias = results
    batch, length, width = grad_BTD.shape
    tiles, options = _tile(batch * length, width)
    units = torch.cuda.get_device_properties(grad_x.device).multi_processor_count if grad_x.is_cuda else 1
    programs = min(tiles, _PROGRAMS * units)
    sums_2PD = grad_BTD.new_empty(2, programs, width, dtype=torch.float32)
    outputs = (grad_x, grad_residual, *sums_2PD)
    numbers = (batch * length, length, width, *_drops(site, threshold), tiles)
    _add_norm_backward_kernel[(programs,)](
        grad_BTD, *saved, weight_D, row_seed_B, *outputs, *numbers, DROPS=threshold > 0, **options
    )
    for grad, sum_D in zip((grad_weight, grad_bias), sums_2PD.sum(1), strict=True):
        grad.copy_(sum_D)


def _launch_gelu(kernel: Any, out: Tensor, width: int, *inputs: Tensor | None) -> None:
    """Fill `out`, which has one or two times `width` columns."""
    rows = out.numel() // out.shape[-1]
    block = min(1024, triton.next_power_of_2(width))
    tile = min(triton.next_power_of_2(rows), 512) if INTERPRETED else max(1, 2048 // block)
    kernel[triton.cdiv(rows, tile), triton.cdiv(width, block)](*inputs, out, rows, width, ROWS=tile, BLOCK_D=block)


def bias_gelu(out: Tensor, x: Tensor, bias_E: Tensor, grad: Tensor | None) -> None:
    _launch_gelu(_bias_gelu_kernel, out, x.shape[-1], x, bias_E, grad)


def geglu(out: Tensor, x: Tensor, grad: Tensor | None) -> None:
    _launch_gelu(_geglu_kernel, out, x.shape[-1] // 2, x, grad)

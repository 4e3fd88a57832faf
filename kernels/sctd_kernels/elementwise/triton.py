"""Elementwise work as Triton kernels: each reads its inputs once and writes its results once.

Dropout masks are worked out from the row seeds, in the backward again: none is stored. Arithmetic is in float32. Sums
over rows (the gradients of weight and bias) are one partial sum a program, added in a fixed order: no atomics.

Legend: B rows, T positions a row, R = B x T, D columns, P programs.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MAX_WIDTH = 8192  # columns that one program holds
_PROGRAMS = 4  # for each multiprocessor


@triton.jit
def _fmix32(x):
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _is_kept(seed_ptr, row_R1, rows, column_1D, length, site, threshold):
    """The mask of `reference._keep_mask`: mixed row seed, then position, then column; one hash for two columns.

    `site` comes as `_site` makes it.
    """
    seed_R1 = tl.load(seed_ptr + row_R1 // length, mask=row_R1 < rows, other=0)
    low_R1 = _fmix32((seed_R1 ^ site).to(tl.uint32))
    high_R1 = _fmix32((seed_R1 >> 32).to(tl.uint32) ^ low_R1)
    key_R1 = _fmix32((row_R1 % length).to(tl.uint32) + ((high_R1 << 31) ^ low_R1))
    key_R1 = _fmix32(key_R1 ^ (high_R1 >> 1))
    hash_RD = _fmix32(key_R1 ^ (column_1D >> 1).to(tl.uint32) * 0x9E3779B9)
    lane_RD = (hash_RD >> ((column_1D & 1) * 16).to(tl.uint32)) & 0xFFFF
    return (lane_RD.to(tl.int32) ^ 0x8000) >= threshold


@triton.jit
def _dropout_kernel(
    x_ptr, seed_ptr, out_ptr, rows, length, width, site, threshold, scale, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    row_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column_1D = tl.arange(0, BLOCK_D)[None, :]
    inside = (row_R1 < rows) & (column_1D < width)
    at = row_R1 * width + column_1D
    kept = _is_kept(seed_ptr, row_R1, rows, column_1D, length, site, threshold)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, tl.where(kept, x * scale, 0.0), mask=inside)


@triton.jit
def _add_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    length,
    width,
    site,
    threshold,
    scale,
    eps,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
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
    grad_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    seed_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    rows,
    length,
    width,
    site,
    threshold,
    scale,
    tiles,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
    row_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
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
    row_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
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


def _site(site: int) -> int:
    """What `hashing.mix_rows` mixes into a row seed for this site."""
    return (0x9E3779B9 * (site + 1)) & 0xFFFFFFFF


def _scale(threshold: int) -> float:
    return 65536 / (65536 - threshold)


def _tile(rows: int, width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile that holds whole rows, and its warps."""
    if width > _MAX_WIDTH:
        raise ValueError(f"dropout and LayerNorm in Triton take up to {_MAX_WIDTH} columns, got {width}")
    block = triton.next_power_of_2(width)
    tile = min(triton.next_power_of_2(rows), max(1, (1 << 18) // block)) if _INTERPRETED else max(1, 512 // block)
    return tile, block, max(1, min(8, tile * block // 256))


@torch.library.custom_op("sctd::dropout", mutates_args=())
def dropout(x_BTD: Tensor, row_seed_B: Tensor, site: int, threshold: int) -> Tensor:
    out = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    batch, length, width = x_BTD.shape
    if out.numel():
        rows, block, warps = _tile(batch * length, width)
        with torch.cuda.device_of(out):  # Triton launches on the current device
            _dropout_kernel[(triton.cdiv(batch * length, rows),)](
                x_BTD.contiguous(), row_seed_B.contiguous(), out, batch * length, length, width, _site(site), threshold,
                _scale(threshold), ROWS=rows, BLOCK_D=block, num_warps=warps,
            )  # fmt: skip
    return out


@dropout.register_fake
def _(x_BTD: Tensor, row_seed_B: Tensor, site: int, threshold: int) -> Tensor:
    return x_BTD.new_empty(x_BTD.shape)


@torch.library.custom_op("sctd::add_norm", mutates_args=())
def add_norm(
    x_BTD: Tensor,
    residual_BTD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    row_seed_B: Tensor,
    site: int,
    threshold: int,
) -> list[Tensor]:
    """The normalised sum, then what the backward needs: the sum itself, mean and 1/deviation."""
    batch, length, width = x_BTD.shape
    out = torch.empty_like(residual_BTD, memory_format=torch.contiguous_format)
    total = torch.empty_like(out)
    mean, rstd = (out.new_empty(batch, length, 1, dtype=torch.float32) for _ in range(2))
    if out.numel():
        rows, block, warps = _tile(batch * length, width)
        with torch.cuda.device_of(out):
            _add_norm_kernel[(triton.cdiv(batch * length, rows),)](
                x_BTD.contiguous(), residual_BTD.contiguous(), weight_D, bias_D, row_seed_B.contiguous(), out, total,
                mean, rstd, batch * length, length, width, _site(site), threshold, _scale(threshold), eps,
                DROPS=threshold > 0, ROWS=rows, BLOCK_D=block, num_warps=warps,
            )  # fmt: skip
    return [out, total, mean, rstd]


@add_norm.register_fake
def _(
    x_BTD: Tensor,
    residual_BTD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    row_seed_B: Tensor,
    site: int,
    threshold: int,
) -> list[Tensor]:
    facts = [residual_BTD.new_empty(*x_BTD.shape[:2], 1, dtype=torch.float32) for _ in range(2)]
    return [residual_BTD.new_empty(x_BTD.shape), residual_BTD.new_empty(x_BTD.shape), *facts]


@torch.library.custom_op("sctd::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_BTD: Tensor,
    weight_D: Tensor,
    row_seed_B: Tensor,
    saved: list[Tensor],
    site: int,
    threshold: int,
    x_dtype: torch.dtype,
) -> list[Tensor]:
    total, mean, rstd = saved
    batch, length, width = total.shape
    grad_residual = torch.empty_like(total)
    grad_x = torch.empty_like(total, dtype=x_dtype)
    if not total.numel():
        return [grad_x, grad_residual, torch.zeros_like(weight_D), torch.zeros_like(weight_D)]
    rows, block, warps = _tile(batch * length, width)
    tiles = triton.cdiv(batch * length, rows)
    on_gpu = total.is_cuda
    units = torch.cuda.get_device_properties(total.device).multi_processor_count if on_gpu else 1
    programs = min(tiles, _PROGRAMS * units)
    sums_2PD = total.new_empty(2, programs, width, dtype=torch.float32)
    with torch.cuda.device_of(total):
        _add_norm_backward_kernel[(programs,)](
            grad_BTD.contiguous(), total, mean, rstd, weight_D, row_seed_B.contiguous(), grad_x, grad_residual,
            sums_2PD[0], sums_2PD[1], batch * length, length, width, _site(site), threshold, _scale(threshold), tiles,
            DROPS=threshold > 0, ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    grad_weight, grad_bias = sums_2PD.sum(1).to(weight_D.dtype).unbind()
    return [grad_x, grad_residual, grad_weight.clone(), grad_bias.clone()]


@_add_norm_backward.register_fake
def _(
    grad_BTD: Tensor,
    weight_D: Tensor,
    row_seed_B: Tensor,
    saved: list[Tensor],
    site: int,
    threshold: int,
    x_dtype: torch.dtype,
) -> list[Tensor]:
    total = saved[0]
    grads = [total.new_empty(total.shape, dtype=x_dtype), total.new_empty(total.shape)]
    return [*grads, weight_D.new_empty(weight_D.shape), weight_D.new_empty(weight_D.shape)]


def add_norm_backward(
    grad_BTD: Tensor,
    weight_D: Tensor,
    row_seed_B: Tensor,
    saved: Sequence[Tensor],
    site: int,
    threshold: int,
    x_dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of x, residual, weight and bias."""
    return _add_norm_backward(grad_BTD, weight_D, row_seed_B, list(saved), site, threshold, x_dtype)


def _launch_gelu(kernel: Any, out: Tensor, width: int, *tensors: Tensor | None) -> Tensor:
    """Fill `out`, which has one or two times `width` columns."""
    if out.numel():
        rows = out.numel() // out.shape[-1]
        block = min(1024, triton.next_power_of_2(width))
        tile = min(triton.next_power_of_2(rows), 512) if _INTERPRETED else max(1, 2048 // block)
        inputs = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        with torch.cuda.device_of(out):
            kernel[triton.cdiv(rows, tile), triton.cdiv(width, block)](
                *inputs, out, rows, width, ROWS=tile, BLOCK_D=block
            )
    return out


@torch.library.custom_op("sctd::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias_E: Tensor) -> Tensor:
    return _launch_gelu(_bias_gelu_kernel, x.new_empty(x.shape), x.shape[-1], x, bias_E, None)


@bias_gelu.register_fake
def _(x: Tensor, bias_E: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("sctd::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(grad: Tensor, x: Tensor, bias_E: Tensor) -> Tensor:
    return _launch_gelu(_bias_gelu_kernel, x.new_empty(x.shape), x.shape[-1], x, bias_E, grad)


@bias_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor, bias_E: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("sctd::geglu", mutates_args=())
def geglu(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    return _launch_gelu(_geglu_kernel, x.new_empty(*x.shape[:-1], width), width, x, None)


@geglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("sctd::geglu_backward", mutates_args=())
def geglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _launch_gelu(_geglu_kernel, x.new_empty(x.shape), x.shape[-1] // 2, x, grad)


@geglu_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_SIZES = {"rows": "i32", "length": "i32", "width": "i32", "site": "i64", "threshold": "i32", "scale": "fp32"}
_TILE = {"ROWS": 1, "BLOCK_D": 1024}
_Listed = list[tuple[Any, dict[str, str], dict[str, Any]]]


def _for_types(x: str, rest: str) -> _Listed:
    seed = {"seed_ptr": "*i64", **_SIZES}
    facts = {"sum_ptr": rest, "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    there = {"x_ptr": x, "residual_ptr": rest, "weight_ptr": rest, "bias_ptr": rest, "out_ptr": rest, "eps": "fp32"}
    back = {"grad_ptr": rest, "weight_ptr": rest, "grad_x_ptr": x, "grad_residual_ptr": rest, "tiles": "i32"}
    sums = {"grad_weight_ptr": "*fp32", "grad_bias_ptr": "*fp32"}
    geglu = {"x_ptr": x, "out_ptr": x, "rows": "i32", "width": "i32"}
    listed: _Listed = [(_dropout_kernel, {"x_ptr": x, "out_ptr": x, **seed}, _TILE)]
    for drops in (False, True):
        listed.append((_add_norm_kernel, {**there, **facts, **seed}, {"DROPS": drops, **_TILE}))
        listed.append((_add_norm_backward_kernel, {**back, **sums, **facts, **seed}, {"DROPS": drops, **_TILE}))
    for kernel, types in ((_bias_gelu_kernel, {**geglu, "bias_ptr": rest}), (_geglu_kernel, geglu)):
        listed.append((kernel, types, {"ROWS": 2, "BLOCK_D": 1024}))
        listed.append((kernel, {**types, "grad_ptr": x}, {"ROWS": 2, "BLOCK_D": 1024}))
    return listed


# For compilation ahead of time: kernel, types of its arguments, values of its constants; other pointers are None.
KERNELS: _Listed = [
    entry
    for x, rest in (("*fp32", "*fp32"), ("*bf16", "*bf16"), ("*fp16", "*fp16"), ("*bf16", "*fp32"))
    for entry in _for_types(x, rest)
]

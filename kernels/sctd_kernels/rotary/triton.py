"""Rotary position embedding as one Triton kernel, which reads a strided input as it lies and writes each number once.

Legend: B rows, T tokens a row, H heads, d width of a head, h = d/2, S places of the table, R = B x T x H.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILE = 1 << 16 if _INTERPRETED else 1 << 10  # pairs: many for numpy, 8 for each thread of a GPU


@triton.jit
def _rotate_kernel(
    x_ptr,
    table_ptr,
    place_ptr,
    out_ptr,
    rows,
    length,
    heads,
    half,
    places,
    stride_B,
    stride_T,
    stride_H,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_h: tl.constexpr,
):
    row_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column_1h = tl.arange(0, BLOCK_h)[None, :]
    in_row = row_R1 < rows
    inside = in_row & (column_1h < half)
    token_R1 = row_R1 // heads
    place_R1 = token_R1 % length
    at = token_R1 // length * stride_B + place_R1 * stride_T + row_R1 % heads * stride_H + column_1h
    first = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + half, mask=inside, other=0.0).to(tl.float32)
    if place_ptr is not None:
        place_R1 = tl.load(place_ptr + token_R1, mask=in_row, other=0)
        place_R1 = tl.minimum(tl.maximum(place_R1, 0), places - 1)
    cosine = tl.load(table_ptr + place_R1 * half + column_1h, mask=inside, other=0.0)
    sine = tl.load(table_ptr + (places + place_R1) * half + column_1h, mask=inside, other=0.0)
    if BACK:
        sine = -sine
    out = row_R1 * 2 * half + column_1h
    tl.store(out_ptr + out, first * cosine - second * sine, mask=inside)
    tl.store(out_ptr + out + half, second * cosine + first * sine, mask=inside)


@torch.library.custom_op("sctd::rotate", mutates_args=())
def rotate(x_BTHd: Tensor, table_2Sh: Tensor, place_BT: Tensor | None, back: bool) -> Tensor:
    """Turned by the angles of the places or, with `back`, by their negatives; a place out of range is moved into it."""
    batch, length, heads, width = x_BTHd.shape
    out_BTHd = torch.empty_like(x_BTHd, memory_format=torch.contiguous_format)
    if out_BTHd.numel():
        x_BTHd = x_BTHd if x_BTHd.stride(3) == 1 else x_BTHd.contiguous()
        place_BT = None if place_BT is None else place_BT.contiguous()
        rows, block = batch * length * heads, triton.next_power_of_2(width // 2)
        tile = max(1, _TILE // block)
        with torch.cuda.device_of(out_BTHd):  # Triton launches on the current device
            _rotate_kernel[(triton.cdiv(rows, tile),)](
                x_BTHd, table_2Sh.contiguous(), place_BT, out_BTHd, rows, length, heads, width // 2,
                table_2Sh.shape[1], *x_BTHd.stride()[:3], BACK=back, ROWS=tile, BLOCK_h=block,
            )  # fmt: skip
    return out_BTHd


@rotate.register_fake
def _(x_BTHd: Tensor, table_2Sh: Tensor, place_BT: Tensor | None, back: bool) -> Tensor:
    return x_BTHd.new_empty(x_BTHd.shape)


_SIZES = dict.fromkeys(("rows", "length", "heads", "half", "places", "stride_B", "stride_T", "stride_H"), "i32")

# For compilation ahead of time: kernel, types of its arguments, values of its constants; other pointers are None.
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (
        _rotate_kernel,
        {"x_ptr": kind, "table_ptr": "*fp32", "out_ptr": kind, **place, **_SIZES},
        {"BACK": back, "ROWS": 32, "BLOCK_h": 32},
    )
    for kind in ("*fp32", "*bf16", "*fp16")
    for place in ({}, {"place_ptr": "*i64"})
    for back in (False, True)
]

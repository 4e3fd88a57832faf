"""Rotary position embedding as one Triton kernel, which reads a strided input as it lies and writes each number once.

Legend: B rows, T tokens a row, H heads, d width of a head, h = d/2, S places of the table, R = B x T x H.
"""

import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.tiles import INTERPRETED, own_rows

_TILE = 1 << 16 if INTERPRETED else 1 << 10  # pairs: many for numpy, 8 for each thread of a GPU


@triton.jit
def _rotate_kernel(
    x_ptr, table_ptr, place_ptr, out_ptr, rows, length, heads, half, places, stride_B, stride_T, stride_H,
    BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK_h: tl.constexpr,
):  # fmt: skip
    row_R1 = own_rows(ROWS)
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


def rotate(out_BTHd: Tensor, x_BTHd: Tensor, table_2Sh: Tensor, place_BT: Tensor | None, back: bool) -> None:
    """A place out of range is moved to the nearest one."""
    batch, length, heads, width = x_BTHd.shape
    x_BTHd = x_BTHd if x_BTHd.stride(3) == 1 else x_BTHd.contiguous()
    place_BT = None if place_BT is None else place_BT.contiguous()
    rows, block = batch * length * heads, triton.next_power_of_2(width // 2)
    tile = max(1, _TILE // block)
    _rotate_kernel[(triton.cdiv(rows, tile),)](
        x_BTHd, table_2Sh.contiguous(), place_BT, out_BTHd, rows, length, heads, width // 2,
        table_2Sh.shape[1], *x_BTHd.stride()[:3], BACK=back, ROWS=tile, BLOCK_h=block,
    )  # fmt: skip

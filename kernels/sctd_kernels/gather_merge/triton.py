"""Raw moves of whole rows as Triton kernels, each one launch that reads and writes every number once.

A program moves a tile of R rows by C columns; rows are counted through the batch, in 64 bits. Every output row has one
writer, so nothing is atomic.

Legend: B rows, S positions a row, K kept positions a row, D hidden size, T = B x K or B x S rows of all.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.tiles import INTERPRETED, own_rows

_TILE = 1 << 16 if INTERPRETED else 1 << 11  # numbers: many for numpy, 16 for each thread of a GPU


@triton.jit
def _tile(total, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row_R1 = own_rows(ROWS)
    column_1C = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row_R1, row_R1 < total, column_1C, column_1C < width


@triton.jit
def _gather_kernel(
    hidden_ptr, index_ptr, out_ptr, total, length, keep, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, in_rows, column, in_columns = _tile(total, width, ROWS, COLUMNS)
    inside = in_rows & in_columns
    index = tl.load(index_ptr + row, mask=in_rows, other=0)
    index = tl.minimum(tl.maximum(index, 0), length - 1)
    values = tl.load(hidden_ptr + (row // keep * length + index) * width + column, mask=inside)
    tl.store(out_ptr + row * width + column, values, mask=inside)


@triton.jit
def _merge_kernel(
    rest_ptr, kept_ptr, inverse_ptr, out_ptr, total, length, keep, width,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Kept rows in place of the rest's, or added to them."""
    row, in_rows, column, in_columns = _tile(total, width, ROWS, COLUMNS)
    inside = in_rows & in_columns
    rank = tl.load(inverse_ptr + row, mask=in_rows, other=-1)
    is_kept = rank >= 0
    values = tl.load(kept_ptr + (row // length * keep + rank) * width + column, mask=inside & is_kept, other=0)
    if rest_ptr is not None:
        rest = tl.load(rest_ptr + row * width + column, mask=inside if ADD else inside & (rank < 0), other=0)
        if ADD:
            if rest.dtype != tl.float64:
                rest = rest.to(tl.float32)
            values = (rest + values).to(out_ptr.dtype.element_ty)
        else:
            values = tl.where(is_kept, values, rest)
    tl.store(out_ptr + row * width + column, values, mask=inside)


@triton.jit
def _merge_backward_kernel(
    grad_ptr, inverse_ptr, hidden_ptr, kept_ptr, total, length, keep, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, in_rows, column, in_columns = _tile(total, width, ROWS, COLUMNS)
    inside = in_rows & in_columns
    rank = tl.load(inverse_ptr + row, mask=in_rows, other=-1)
    values = tl.load(grad_ptr + row * width + column, mask=inside)
    tl.store(hidden_ptr + row * width + column, tl.where(rank < 0, values, 0), mask=inside)
    tl.store(kept_ptr + (row // length * keep + rank) * width + column, values, mask=inside & (rank >= 0))


def _launch(
    kernel: Any, total: int, length: int, keep: int, width: int, *tensors: Tensor | None, **constants: bool
) -> None:
    even = width & -width  # the largest power of two that divides D: no lane of a tile idles
    columns = min(1024, even if even >= 128 else triton.next_power_of_2(width))
    rows = max(1, _TILE // columns)
    grid = triton.cdiv(total, rows), triton.cdiv(width, columns)
    kernel[grid](*tensors, total, length, keep, width, ROWS=rows, COLUMNS=columns, **constants)


def gather(out_BKD: Tensor, hidden_BSD: Tensor, index_BK: Tensor) -> None:
    """An index out of range is moved to the nearest one."""
    batch, length, width = hidden_BSD.shape
    keep = index_BK.shape[1]
    _launch(_gather_kernel, batch * keep, length, keep, width, hidden_BSD, index_BK, out_BKD)


def split_backward(
    out_BSD: Tensor, grad_kept_BKD: Tensor, grad_rest_BSD: Tensor | None, kept_BK: Tensor, inverse_BS: Tensor
) -> None:
    """Added in float32 or wider."""
    batch, length, width = out_BSD.shape
    tensors = grad_rest_BSD, grad_kept_BKD, inverse_BS, out_BSD
    _launch(_merge_kernel, batch * length, length, kept_BK.shape[1], width, *tensors, ADD=True)


def merge(out_BSD: Tensor, hidden_BSD: Tensor, kept_BKD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> None:
    batch, length, width = out_BSD.shape
    tensors = hidden_BSD, kept_BKD, inverse_BS, out_BSD
    _launch(_merge_kernel, batch * length, length, kept_BK.shape[1], width, *tensors, ADD=False)


def merge_backward(grads: tuple[Tensor, Tensor], grad_BSD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> None:
    batch, length, width = grad_BSD.shape
    _launch(_merge_backward_kernel, batch * length, length, kept_BK.shape[1], width, grad_BSD, inverse_BS, *grads)

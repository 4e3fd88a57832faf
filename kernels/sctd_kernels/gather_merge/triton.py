"""Raw moves of whole rows as Triton kernels, each one launch that reads and writes every number once.

A program moves a tile of R rows by C columns; rows are counted through the batch, in 64 bits. Every output row has one
writer, so nothing is atomic.

Legend: B rows, S positions a row, K kept positions a row, D hidden size, T = B x K or B x S rows of all.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILE = 1 << 16 if _INTERPRETED else 1 << 11  # numbers: many for numpy, 16 for each thread of a GPU


@triton.jit
def _tile(total, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
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
    rest_ptr,
    kept_ptr,
    inverse_ptr,
    out_ptr,
    total,
    length,
    keep,
    width,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
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
    if total == 0 or width == 0:
        return
    even = width & -width  # the largest power of two that divides D: no lane of a tile idles
    columns = min(1024, even if even >= 128 else triton.next_power_of_2(width))
    rows = max(1, _TILE // columns)
    grid = triton.cdiv(total, rows), triton.cdiv(width, columns)
    with torch.cuda.device_of(tensors[-1]):  # Triton launches on the current device
        kernel[grid](*tensors, total, length, keep, width, ROWS=rows, COLUMNS=columns, **constants)


def gather(hidden_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """out[b, k] = hidden[b, index[b, k]]; an index out of range is moved to the nearest one."""
    batch, length, width = hidden_BSD.shape
    keep = index_BK.shape[1]
    out_BKD = hidden_BSD.new_empty(batch, keep, width)
    tensors = hidden_BSD.contiguous(), index_BK.contiguous(), out_BKD
    _launch(_gather_kernel, batch * keep, length, keep, width, *tensors)
    return out_BKD


def split_backward(grad_kept_BKD: Tensor, grad_rest_BSD: Tensor | None, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    """out[b, s] = grad_rest[b, s] + (grad_kept[b, inverse[b, s]] where kept, else 0), added in float32 or wider."""
    batch, length = inverse_BS.shape
    _, keep, width = grad_kept_BKD.shape
    out_BSD = grad_kept_BKD.new_empty(batch, length, width)
    rest_BSD = None if grad_rest_BSD is None else grad_rest_BSD.contiguous()
    tensors = rest_BSD, grad_kept_BKD.contiguous(), inverse_BS.contiguous(), out_BSD
    _launch(_merge_kernel, batch * length, length, keep, width, *tensors, ADD=True)
    return out_BSD


def merge(hidden_BSD: Tensor, kept_BKD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> Tensor:
    """out[b, s] = kept[b, inverse[b, s]] where kept, else hidden[b, s]."""
    batch, length, width = hidden_BSD.shape
    out_BSD = torch.empty_like(hidden_BSD, memory_format=torch.contiguous_format)
    tensors = hidden_BSD.contiguous(), kept_BKD.contiguous(), inverse_BS.contiguous(), out_BSD
    _launch(_merge_kernel, batch * length, length, kept_BK.shape[1], width, *tensors, ADD=False)
    return out_BSD


def merge_backward(grad_BSD: Tensor, kept_BK: Tensor, inverse_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden, zero where kept, and of kept."""
    batch, length, width = grad_BSD.shape
    keep = kept_BK.shape[1]
    grad_hidden_BSD = torch.empty_like(grad_BSD, memory_format=torch.contiguous_format)
    grad_kept_BKD = grad_BSD.new_empty(batch, keep, width)
    tensors = grad_BSD.contiguous(), inverse_BS.contiguous(), grad_hidden_BSD, grad_kept_BKD
    _launch(_merge_backward_kernel, batch * length, length, keep, width, *tensors)
    return grad_hidden_BSD, grad_kept_BKD


_Listed = list[tuple[Any, dict[str, str], dict[str, Any]]]


def _for_type(kind: str) -> _Listed:
    gathered = {"hidden_ptr": kind, "index_ptr": "*i64", "out_ptr": kind}
    added = {"kept_ptr": kind, "inverse_ptr": "*i64", "out_ptr": kind}
    merged = {"rest_ptr": kind, **added}
    parted = {"grad_ptr": kind, "inverse_ptr": "*i64", "hidden_ptr": kind, "kept_ptr": kind}
    sizes = {"total": "i32", "length": "i32", "keep": "i32", "width": "i32"}
    common = {"ROWS": 8, "COLUMNS": 256}
    single = {"ROWS": 2048, "COLUMNS": 1, **dict.fromkeys(sizes, 1)}  # Triton turns sizes of 1 into constants
    listed: _Listed = [
        (_gather_kernel, gathered, {}),
        (_merge_kernel, merged, {"ADD": False}),
        (_merge_kernel, merged, {"ADD": True}),
        (_merge_kernel, added, {"ADD": True}),
        (_merge_backward_kernel, parted, {}),
    ]
    usual: _Listed = [(kernel, {**types, **sizes}, {**values, **common}) for kernel, types, values in listed]
    return usual + [(kernel, types, {**values, **single}) for kernel, types, values in listed]


# For compilation ahead of time: kernel, types of its arguments, values of its constants; other pointers are None.
KERNELS: _Listed = [entry for kind in ("*fp32", "*bf16", "*fp16") for entry in _for_type(kind)]

"""Cross-entropy as Triton kernels: one pass over the logits forward, one backward.

Legend: N predicted positions, V vocabulary, R rows of a tile.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FIXED_POINT = tl.constexpr(2.0**24)  # as in the reference
_MAX_LOSS = tl.constexpr(1e4)


@triton.jit
def _losses_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    normaliser_ptr,
    sums_ptr,
    counts_ptr,
    rows,
    vocabulary,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    in_row = row_R1 < rows
    largest = tl.full((ROWS, 1), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS, 1), dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        column_1V = start + tl.arange(0, BLOCK_V)[None, :]
        inside = in_row & (column_1V < vocabulary)
        logits = tl.load(logits_ptr + row_R1 * vocabulary + column_1V, mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(logits, axis=1, keep_dims=True))
        shift = tl.where(new == float("-inf"), 0.0, new)  # a row may begin with nothing but -inf
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift), axis=1, keep_dims=True)
        largest = new
    normaliser = tl.log(tl.where(in_row, total, 1.0)) + tl.where(largest == float("-inf"), 0.0, largest)
    label = tl.load(labels_ptr + row_R1, mask=in_row, other=0)
    label = tl.minimum(tl.maximum(label, 0), vocabulary - 1)
    own = tl.load(logits_ptr + row_R1 * vocabulary + label, mask=in_row, other=0.0).to(tl.float32)
    loss = normaliser - own
    tl.store(losses_ptr + row_R1, loss, mask=in_row)
    tl.store(normaliser_ptr + row_R1, normaliser, mask=in_row)
    if sums_ptr is not None:
        finite = in_row & (tl.abs(loss) < float("inf"))
        scaled = tl.where(finite, tl.minimum(tl.maximum(loss, 0.0), _MAX_LOSS), 0.0) * _FIXED_POINT
        whole = tl.floor(scaled)
        rest = scaled - whole  # exact, as is the scaling by a power of two
        fixed = whole.to(tl.int64)
        up = (rest > 0.5) | ((rest == 0.5) & ((fixed & 1) == 1))  # half to even
        tl.atomic_add(sums_ptr + label, fixed + up.to(tl.int64), mask=finite)
        tl.atomic_add(counts_ptr + label, tl.full((ROWS, 1), 1, dtype=tl.int64), mask=finite)


@triton.jit
def _losses_backward_kernel(
    grad_ptr,
    logits_ptr,
    labels_ptr,
    normaliser_ptr,
    out_ptr,
    rows,
    vocabulary,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column_1V = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    in_row = row_R1 < rows
    inside = in_row & (column_1V < vocabulary)
    at = row_R1 * vocabulary + column_1V
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.exp(logits - tl.load(normaliser_ptr + row_R1, mask=in_row, other=0.0))
    share -= (column_1V == tl.load(labels_ptr + row_R1, mask=in_row, other=0)).to(tl.float32)
    tl.store(out_ptr + at, share * tl.load(grad_ptr + row_R1, mask=in_row, other=0.0), mask=inside)


def _tile(rows: int, vocabulary: int) -> tuple[int, int]:
    block = min(4096, triton.next_power_of_2(vocabulary))
    return (min(triton.next_power_of_2(rows), max(1, (1 << 20) // block)) if _INTERPRETED else 1), block


@torch.library.custom_op("sctd::token_losses", mutates_args=("sum_count_2V",))
def token_losses(logits_NV: Tensor, labels_N: Tensor, sum_count_2V: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses and the logarithm of each row's normaliser, both float32 (N,)."""
    rows, vocabulary = logits_NV.shape
    losses_N, normaliser_N = (logits_NV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        tile, block = _tile(rows, vocabulary)
        sums, counts = (None, None) if sum_count_2V is None else sum_count_2V.unbind()
        with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
            _losses_kernel[(triton.cdiv(rows, tile),)](
                logits_NV.contiguous(), labels_N.contiguous(), losses_N, normaliser_N, sums, counts, rows, vocabulary,
                ROWS=tile, BLOCK_V=block, num_warps=8,
            )  # fmt: skip
    return losses_N, normaliser_N


@token_losses.register_fake
def _(logits_NV: Tensor, labels_N: Tensor, sum_count_2V: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = len(labels_N)
    return logits_NV.new_empty(rows, dtype=torch.float32), logits_NV.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("sctd::token_losses_backward", mutates_args=())
def token_losses_backward(grad_N: Tensor, logits_NV: Tensor, labels_N: Tensor, normaliser_N: Tensor) -> Tensor:
    """(softmax - one-hot of the label) x the loss's gradient, in the dtype of the logits."""
    rows, vocabulary = logits_NV.shape
    out_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    if rows:
        tile, block = _tile(rows, vocabulary)
        with torch.cuda.device_of(out_NV):
            _losses_backward_kernel[(triton.cdiv(rows, tile), triton.cdiv(vocabulary, block))](
                grad_N.contiguous(), logits_NV.contiguous(), labels_N.contiguous(), normaliser_N, out_NV, rows,
                vocabulary, ROWS=tile, BLOCK_V=block, num_warps=8,
            )  # fmt: skip
    return out_NV


@token_losses_backward.register_fake
def _(grad_N: Tensor, logits_NV: Tensor, labels_N: Tensor, normaliser_N: Tensor) -> Tensor:
    return logits_NV.new_empty(logits_NV.shape)


# For compilation ahead of time: kernel, types of its arguments, values of its constants; other pointers are None.
_FACTS = {"labels_ptr": "*i64", "normaliser_ptr": "*fp32", "rows": "i32", "vocabulary": "i32"}
_TILE = {"ROWS": 1, "BLOCK_V": 4096}
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
for _kind in ("*fp32", "*bf16", "*fp16"):
    _there = {"logits_ptr": _kind, "losses_ptr": "*fp32", **_FACTS}
    KERNELS += [
        (_losses_kernel, {**_there, "sums_ptr": "*i64", "counts_ptr": "*i64"}, _TILE),
        (_losses_kernel, _there, _TILE),
        (_losses_backward_kernel, {"grad_ptr": "*fp32", "logits_ptr": _kind, "out_ptr": _kind, **_FACTS}, _TILE),
    ]

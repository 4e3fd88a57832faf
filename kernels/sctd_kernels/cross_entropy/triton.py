"""Cross-entropy as Triton kernels: one pass over the logits forward, one backward.

Legend: N predicted positions, V vocabulary, R rows of a tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.cross_entropy import reference
from sctd_kernels.tiles import INTERPRETED, own_rows

_FIXED_POINT = tl.constexpr(reference.FIXED_POINT)
_MAX_LOSS = tl.constexpr(reference.MAX_LOSS)


@triton.jit
def _losses_kernel(
    logits_ptr, labels_ptr, losses_ptr, normaliser_ptr, sums_ptr, counts_ptr, rows, vocabulary,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row_R1 = own_rows(ROWS)
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
    grad_ptr, logits_ptr, labels_ptr, normaliser_ptr, out_ptr, rows, vocabulary,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row_R1 = own_rows(ROWS)
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
    return (min(triton.next_power_of_2(rows), max(1, (1 << 20) // block)) if INTERPRETED else 1), block


def token_losses(
    results: tuple[Tensor, Tensor], logits_NV: Tensor, labels_N: Tensor, sum_count_2V: Tensor | None
) -> None:
    rows, vocabulary = logits_NV.shape
    tile, block = _tile(rows, vocabulary)
    sums, counts = (None, None) if sum_count_2V is None else sum_count_2V.unbind()
    _losses_kernel[(triton.cdiv(rows, tile),)](
        logits_NV.contiguous(), labels_N.contiguous(), *results, sums, counts, rows, vocabulary,
        ROWS=tile, BLOCK_V=block, num_warps=8,
    )  # fmt: skip


def token_losses_backward(
    out_NV: Tensor, logits_NV: Tensor, labels_N: Tensor, normaliser_N: Tensor, grad_N: Tensor
) -> None:
    rows, vocabulary = logits_NV.shape
    tile, block = _tile(rows, vocabulary)
    _losses_backward_kernel[(triton.cdiv(rows, tile), triton.cdiv(vocabulary, block))](
        grad_N, logits_NV, labels_N, normaliser_N, out_NV, rows, vocabulary, ROWS=tile, BLOCK_V=block, num_warps=8
    )

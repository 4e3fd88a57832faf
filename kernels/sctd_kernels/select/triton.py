"""Selection as one Triton kernel: no sort, no atomics, nothing kept in memory between its steps.

The K-th largest key of a row is found by bisection from the highest bit down. A key is two 32-bit words, score above
hash, so the score word comes first, and then the hash among the positions whose score is the threshold. Each step
settles two bits: three candidate thresholds are counted in one reduction, their counts packed into one 64-bit integer.
A prefix sum then gives every position its rank among the kept or the dropped ones.

Legend: B rows, S positions a row, K kept positions a row, N = S - K dropped, V vocabulary, R rows of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.tiles import INTERPRETED, fmix32, own_rows

_TILE = 1 << 16  # elements of a tile under the interpreter, where a launch should be few numpy calls


@triton.jit
def _ordered(score):
    """uint32 that orders as the score does, in integers only: -0.0 as 0.0, NaN as -inf."""
    if score.dtype == tl.bfloat16:  # the upper half of a float32; the interpreter's cast loses subnormal numbers
        bits = score.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    else:
        bits = score.to(tl.float32).to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)
    bits = tl.where(magnitude > 0x7F800000, 0xFF800000, bits)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _kth_largest(word_RS, among_RS, rank_R1):
    """The rank-th largest (from 1) of the words in `among`, of which there must be as many: uint32 (R, 1)."""
    found_R1 = tl.zeros_like(rank_R1).to(tl.uint32)
    unit_R1 = found_R1 + 0x40000000
    for _ in range(16):
        first = (word_RS >= found_R1 + unit_R1).to(tl.int64)
        second = (word_RS >= found_R1 + unit_R1 * 2).to(tl.int64)
        third = (word_RS >= found_R1 + unit_R1 * 3).to(tl.int64)
        packed = tl.where(among_RS, first | (second << 16) | (third << 32), 0)
        count_R1 = tl.sum(packed, axis=1, keep_dims=True)
        enough = ((count_R1 & 0xFFFF) >= rank_R1).to(tl.uint32)
        enough += (((count_R1 >> 16) & 0xFFFF) >= rank_R1).to(tl.uint32)
        enough += ((count_R1 >> 32) >= rank_R1).to(tl.uint32)
        found_R1 += unit_R1 * enough
        unit_R1 = unit_R1 >> 2
    return found_R1


@triton.jit
def _select_kernel(
    scores_ptr, table_ptr, seed_ptr, forced_keep_ptr, forced_drop_ptr, carry0_ptr, carry1_ptr,
    kept_ptr, dropped_ptr, inverse_ptr, carried0_ptr, carried1_ptr,
    rows, length, keep, vocabulary, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row_R1 = own_rows(ROWS)
    position_1S = tl.arange(0, BLOCK_S)[None, :]
    valid_RS = (row_R1 < rows) & (position_1S < length)
    at_RS = row_R1 * length + position_1S

    score_RS = tl.load(scores_ptr + at_RS, mask=valid_RS, other=0)
    if table_ptr is not None:
        id_RS = tl.minimum(tl.maximum(score_RS.to(tl.int64), 0), vocabulary - 1)
        score_RS = tl.load(table_ptr + id_RS, mask=valid_RS, other=0.0)
    word_RS = _ordered(score_RS)
    if forced_keep_ptr is not None:
        word_RS = tl.where(tl.load(forced_keep_ptr + at_RS, mask=valid_RS, other=0) != 0, 0xFF800000, word_RS)
    if forced_drop_ptr is not None:
        word_RS = tl.where(tl.load(forced_drop_ptr + at_RS, mask=valid_RS, other=0) != 0, 0x007FFFFF, word_RS)

    seed_R1 = tl.load(seed_ptr + row_R1, mask=row_R1 < rows, other=0)
    hash_RS = fmix32(position_1S.to(tl.uint32) + seed_R1.to(tl.uint32))
    hash_RS = fmix32(hash_RS ^ (seed_R1 >> 32).to(tl.uint32))

    wanted_R1 = tl.zeros_like(seed_R1) + keep
    least_R1 = _kth_largest(word_RS, valid_RS, wanted_R1)
    above_RS = valid_RS & (word_RS > least_R1)
    tied_RS = valid_RS & (word_RS == least_R1)
    wanted_R1 -= tl.sum(above_RS.to(tl.int64), axis=1, keep_dims=True)
    least_R1 = _kth_largest(hash_RS, tied_RS, wanted_R1)
    kept_RS = above_RS | (tied_RS & (hash_RS >= least_R1))

    up_to_RS = tl.cumsum(kept_RS.to(tl.int32), axis=1)
    tl.store(inverse_ptr + at_RS, tl.where(kept_RS, up_to_RS - 1, -1), mask=valid_RS)
    to_RS = row_R1 * keep + up_to_RS - 1
    tl.store(kept_ptr + to_RS, position_1S, mask=kept_RS)
    if carry0_ptr is not None:
        tl.store(carried0_ptr + to_RS, tl.load(carry0_ptr + at_RS, mask=kept_RS, other=0), mask=kept_RS)
    if carry1_ptr is not None:
        tl.store(carried1_ptr + to_RS, tl.load(carry1_ptr + at_RS, mask=kept_RS, other=0), mask=kept_RS)
    to_RS = row_R1 * (length - keep) + position_1S - up_to_RS
    tl.store(dropped_ptr + to_RS, position_1S, mask=valid_RS & (kept_RS == 0))


def select(
    results: list[Tensor],
    scores_BS: Tensor,
    keep: int,
    row_seed_B: Tensor,
    forced_keep_BS: Tensor | None,
    forced_drop_BS: Tensor | None,
    table_V: Tensor | None,
    carry: list[Tensor],
) -> None:
    rows, length = scores_BS.shape
    block = triton.next_power_of_2(length)
    tile = min(triton.next_power_of_2(rows), max(1, _TILE // block)) if INTERPRETED else 1
    vocabulary = 0 if table_V is None else len(table_V)
    inputs = (scores_BS, table_V, row_seed_B, _bytes(forced_keep_BS), _bytes(forced_drop_BS), *_two(carry))
    _select_kernel[(triton.cdiv(rows, tile),)](
        *inputs, *results[:3], *_two(results[3:]), rows, length, keep, vocabulary,
        ROWS=tile, BLOCK_S=block, num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip


def _bytes(entries: Tensor | None) -> Tensor | None:
    """Numbers where they are truth values."""
    return entries.view(torch.uint8) if entries is not None and entries.dtype == torch.bool else entries


def _two(carry: list[Tensor]) -> tuple[Tensor | None, ...]:
    return (*map(_bytes, carry), None, None)[:2]

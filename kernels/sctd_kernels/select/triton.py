"""Selection as one Triton kernel: no sort, no atomics, nothing kept in memory between its steps.

The K-th largest key of a row is found by bisection from the highest bit down. A key is two 32-bit words, score above
hash, so the score word comes first, and then the hash among the positions whose score is the threshold. Each step
settles two bits: three candidate thresholds are counted in one reduction, their counts packed into one 64-bit integer.
A prefix sum then gives every position its rank among the kept or the dropped ones.

Legend: B rows, S positions a row, K kept positions a row, N = S - K dropped, V vocabulary, R rows of a tile.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.select.reference import Selection

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILE = 1 << 16  # elements of a tile under the interpreter, where a launch should be few numpy calls


@triton.jit
def _fmix32(x):
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


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
    scores_ptr,
    table_ptr,
    seed_ptr,
    forced_keep_ptr,
    forced_drop_ptr,
    carry0_ptr,
    carry1_ptr,
    kept_ptr,
    dropped_ptr,
    inverse_ptr,
    carried0_ptr,
    carried1_ptr,
    rows,
    length,
    keep,
    vocabulary,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
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
    hash_RS = _fmix32(position_1S.to(tl.uint32) + seed_R1.to(tl.uint32))
    hash_RS = _fmix32(hash_RS ^ (seed_R1 >> 32).to(tl.uint32))

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
    scores_BS: Tensor,
    keep: int,
    row_seed_B: Tensor,
    forced_keep_BS: Tensor | None,
    forced_drop_BS: Tensor | None,
    table_V: Tensor | None,
    carry: Sequence[Tensor],
) -> Selection:
    rows, length = scores_BS.shape
    inverse_BS = torch.empty(rows, length, dtype=torch.int64, device=scores_BS.device)
    kept_BK, dropped_BN = inverse_BS.new_empty(rows, keep), inverse_BS.new_empty(rows, length - keep)
    carried = tuple(entries.new_empty(rows, keep) for entries in carry)
    selection = Selection(kept_BK, dropped_BN, inverse_BS, carried)
    if rows == 0:
        return selection
    block = triton.next_power_of_2(length)
    tile = min(triton.next_power_of_2(rows), max(1, _TILE // block)) if _INTERPRETED else 1
    with torch.cuda.device_of(scores_BS):  # Triton launches on the current device
        _select_kernel[(triton.cdiv(rows, tile),)](
            scores_BS.contiguous(),
            None if table_V is None else table_V.contiguous(),
            row_seed_B.contiguous(),
            _bytes(forced_keep_BS),
            _bytes(forced_drop_BS),
            *_two(carry),
            kept_BK,
            dropped_BN,
            inverse_BS,
            *_two(carried),
            rows,
            length,
            keep,
            0 if table_V is None else len(table_V),
            ROWS=tile,
            BLOCK_S=block,
            num_warps=max(1, min(16, block // 256)),
        )
    return selection


def _bytes(entries: Tensor | None) -> Tensor | None:
    """Contiguous, and numbers where they are truth values."""
    if entries is None:
        return None
    return (entries.view(torch.uint8) if entries.dtype == torch.bool else entries).contiguous()


def _two(carry: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    first, second = (*map(_bytes, carry), None, None)[:2]
    return first, second


# For compilation ahead of time: kernel, types of its arguments, values of its constants; other pointers are None.
_SIZES = {"rows": "i32", "length": "i32", "keep": "i32", "vocabulary": "i32"}
_SIZES_OF_1 = dict.fromkeys(_SIZES, 1)  # which Triton turns into constants
_MAPS = {"seed_ptr": "*i64", "kept_ptr": "*i64", "dropped_ptr": "*i64", "inverse_ptr": "*i64"}
_TABLE = {"scores_ptr": "*i64", "table_ptr": "*fp32", **_MAPS}
_FORCED = {"forced_keep_ptr": "*u8", "forced_drop_ptr": "*u8"}
_CARRY = {"carry0_ptr": "*u8", "carried0_ptr": "*u8", "carry1_ptr": "*i64", "carried1_ptr": "*i64"}
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (_select_kernel, {**_TABLE, **_CARRY, **_SIZES}, {"ROWS": 1, "BLOCK_S": 512}),
    (_select_kernel, {**_TABLE, **_CARRY}, {"ROWS": 1, "BLOCK_S": 1, **_SIZES_OF_1}),
    (_select_kernel, {"scores_ptr": "*fp32", **_FORCED, **_MAPS, **_SIZES}, {"ROWS": 1, "BLOCK_S": 8192}),
    (_select_kernel, {"scores_ptr": "*bf16", **_FORCED, **_CARRY, **_MAPS, **_SIZES}, {"ROWS": 1, "BLOCK_S": 2}),
    (_select_kernel, {"scores_ptr": "*fp16", **_MAPS, **_SIZES}, {"ROWS": 1, "BLOCK_S": 128}),
]

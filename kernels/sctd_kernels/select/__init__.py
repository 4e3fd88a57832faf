"""Choose the K positions of each row that go through the dropped layers.

Legend: B rows, S positions a row, K kept positions a row, N = S - K dropped ones, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sctd_kernels.dispatch import Operation, either, require, require_range, say
from sctd_kernels.select import reference

__all__ = ["LONGEST", "SELECT", "Selection", "select"]

LONGEST = 8192  # positions a row: the counts of three thresholds share one integer, and a row one multiprocessor
_SCORES = (torch.float32, torch.bfloat16, torch.float16)
_IDS = (torch.int64, torch.int32)
_CARRY = (torch.bool, torch.int32, torch.int64)


class Selection(NamedTuple):
    """A choice of K of S positions per row; kept and dropped together are a permutation of all positions.

    kept_BK, dropped_BN: int64, ascending.
    inverse_BS: int64, rank of a position among the kept ones, -1 where it is dropped.
    carried: kept entries (B, K) of the tensors that `select` was given as `carry`.
    """

    kept_BK: Tensor
    dropped_BN: Tensor
    inverse_BS: Tensor
    carried: tuple[Tensor, ...] = ()


def _empty(scores_BS: Tensor, keep: int, *others: Any) -> list[Tensor]:
    rows, length = scores_BS.shape
    positions = [scores_BS.new_empty(rows, size, dtype=torch.int64) for size in (keep, length - keep, length)]
    carry = others[-1]
    return [*positions, *(entries_BS.new_empty(rows, keep) for entries_BS in carry)]


SELECT = Operation(reference.select, _empty, has_cuda=True)


def select(
    scores_BS: Tensor,
    keep: int,
    row_seed_B: Tensor,
    forced_keep_BS: Tensor | None = None,
    forced_drop_BS: Tensor | None = None,
    *,
    table_V: Tensor | None = None,
    carry: Sequence[Tensor] = (),
) -> Selection:
    """Keep the `keep` highest-scored positions of each row, in ascending order of position.

    Equal scores are ordered by a hash of (row seed, position), so that a choice does not depend on where in a batch, or
    on which rank, its row stands. A score of +inf keeps a position, one of -inf drops it, as far as K allows: where a
    row has more of them than that, the hash chooses among them.

    Args:
        scores_BS: float32, bfloat16 or float16 (B, S); with `table_V`, int64 or int32 ids whose score is `table_V[id]`.
        keep: K, 1 <= K <= S <= 8192.
        row_seed_B: int64 (B,), one seed per row.
        forced_keep_BS: bool (B, S) or None; True is a score of +inf.
        forced_drop_BS: bool (B, S) or None; True is a score of -inf, where both are set too.
        table_V: float32 (V,) or None.
        carry: at most two tensors (B, S) of bool, int32 or int64, whose kept entries `Selection.carried` holds.

    Raises:
        ValueError: K or S out of range, or shapes, devices or dtypes that do not fit. On CPUs also a score that is NaN
            and an id outside of the table. To look for those on a GPU would make the host wait: there NaN ranks as
            -inf, and an id is moved to the nearest one in the table.
    """
    _check(scores_BS, keep, row_seed_B, table_V)
    for name, mask_BS in (("forced_keep", forced_keep_BS), ("forced_drop", forced_drop_BS)):
        if mask_BS is not None:
            require(f"select: {name}", mask_BS, scores_BS.shape, (torch.bool,), scores_BS)
    if len(carry) > 2:
        raise ValueError(f"select: carry may hold two tensors, got {len(carry)}")
    for entries_BS in carry:
        require("select: carry", entries_BS, scores_BS.shape, _CARRY, scores_BS)
    found = SELECT(scores_BS, keep, row_seed_B, forced_keep_BS, forced_drop_BS, table_V, list(carry))
    return Selection(found[0], found[1], found[2], tuple(found[3:]))


def _check(scores_BS: Tensor, keep: int, row_seed_B: Tensor, table_V: Tensor | None) -> None:
    what, dtypes = ("scores", _SCORES) if table_V is None else ("ids beside a table", _IDS)
    if scores_BS.dim() != 2 or scores_BS.dtype not in dtypes:
        raise ValueError(f"select: {what} must be {either(dtypes)} (B, S), got {say(scores_BS)}")
    rows, length = scores_BS.shape
    if length > LONGEST:
        raise ValueError(f"select: rows may have {LONGEST} positions, got {tuple(scores_BS.shape)}; use shorter rows")
    if not 1 <= keep <= length:
        raise ValueError(f"select: keep must be in 1..S, got keep={keep} for scores of shape {tuple(scores_BS.shape)}")
    require("select: row_seed", row_seed_B, (rows,), (torch.int64,), scores_BS)
    if table_V is not None:
        require("select: table", table_V, (max(1, table_V.numel()),), (torch.float32,), scores_BS)
    if scores_BS.device.type == "cpu" and not torch.compiler.is_compiling():
        values, what = (scores_BS, "scores") if table_V is None else (table_V, "table")
        nan = values.isnan()
        if nan.any():
            first = tuple(nan.nonzero()[0].tolist())
            raise ValueError(f"select: NaN in the {what} {tuple(values.shape)}, first at {first}")
        if table_V is not None:
            require_range("select: ids", scores_BS, table_V, 0)

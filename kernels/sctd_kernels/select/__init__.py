"""Choose the K positions of each row that go through the dropped layers.

Legend: B rows, S positions a row, K kept positions a row, V vocabulary.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sctd_kernels.dispatch import backend
from sctd_kernels.select import reference
from sctd_kernels.select.reference import Selection

__all__ = ["LONGEST", "Selection", "select"]

LONGEST = 8192  # positions a row: the counts of three thresholds share one integer, and a row one multiprocessor
_SCORES = (torch.float32, torch.bfloat16, torch.float16)
_IDS = (torch.int64, torch.int32)
_CARRY = (torch.bool, torch.int32, torch.int64)


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
    carry = tuple(carry)
    _check(scores_BS, keep, row_seed_B, table_V)
    _check_beside(scores_BS, {"forced_keep": forced_keep_BS, "forced_drop": forced_drop_BS}, carry)
    if scores_BS.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(scores_BS, table_V)
    run = _implementation(scores_BS.device.type)
    return run(scores_BS, keep, row_seed_B, forced_keep_BS, forced_drop_BS, table_V, carry)


def _implementation(device_type: str) -> Callable[..., Selection]:
    chosen = backend(device_type)
    if chosen == "torch":
        return reference.select
    # Eager calls go straight to the kernels: the dispatcher would cost more than they do.
    return _compiled if torch.compiler.is_compiling() else _kernel(chosen)


def _kernel(chosen: str) -> Callable[..., Selection]:
    return importlib.import_module(f"sctd_kernels.select.{chosen}").select


@torch.library.custom_op("sctd::select", mutates_args=())
def _operator(
    scores_BS: Tensor,
    keep: int,
    row_seed_B: Tensor,
    forced_keep_BS: Tensor | None,
    forced_drop_BS: Tensor | None,
    table_V: Tensor | None,
    carry: list[Tensor],
) -> list[Tensor]:
    run = _kernel(backend(scores_BS.device.type))
    selection = run(scores_BS, keep, row_seed_B, forced_keep_BS, forced_drop_BS, table_V, carry)
    return [*selection[:3], *selection.carried]


@_operator.register_fake
def _(
    scores_BS: Tensor,
    keep: int,
    row_seed_B: Tensor,
    forced_keep_BS: Tensor | None,
    forced_drop_BS: Tensor | None,
    table_V: Tensor | None,
    carry: list[Tensor],
) -> list[Tensor]:
    rows, length = scores_BS.shape
    positions = [scores_BS.new_empty(rows, size, dtype=torch.int64) for size in (keep, length - keep, length)]
    return [*positions, *(entries_BS.new_empty(rows, keep) for entries_BS in carry)]


def _compiled(
    scores_BS: Tensor,
    keep: int,
    row_seed_B: Tensor,
    forced_keep_BS: Tensor | None,
    forced_drop_BS: Tensor | None,
    table_V: Tensor | None,
    carry: tuple[Tensor, ...],
) -> Selection:
    parts = _operator(scores_BS, keep, row_seed_B, forced_keep_BS, forced_drop_BS, table_V, list(carry))
    return Selection(parts[0], parts[1], parts[2], tuple(parts[3:]))


def _say(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _check(scores_BS: Tensor, keep: int, row_seed_B: Tensor, table_V: Tensor | None) -> None:
    if table_V is None and (scores_BS.dim() != 2 or scores_BS.dtype not in _SCORES):
        raise ValueError(f"select: scores must be float32, bfloat16 or float16 (B, S), got {_say(scores_BS)}")
    device = scores_BS.device
    if table_V is not None:
        if scores_BS.dim() != 2 or scores_BS.dtype not in _IDS:
            raise ValueError(f"select: ids must be int64 or int32 (B, S) beside a table, got {_say(scores_BS)}")
        fits = table_V.dim() == 1 and len(table_V) > 0 and table_V.dtype == torch.float32 and table_V.device == device
        if not fits:
            raise ValueError(f"select: table must be float32 (V,) on {device}, got {_say(table_V)}")
    rows, length = scores_BS.shape
    if length > LONGEST:
        raise ValueError(f"select: rows may have {LONGEST} positions, got {tuple(scores_BS.shape)}; use shorter rows")
    if not 1 <= keep <= length:
        raise ValueError(f"select: keep must be in 1..S, got keep={keep} for scores of shape {tuple(scores_BS.shape)}")
    if row_seed_B.shape != (rows,) or row_seed_B.dtype != torch.int64 or row_seed_B.device != device:
        raise ValueError(
            f"select: row_seed must be int64 ({rows},), got {_say(row_seed_B)} for scores {_say(scores_BS)}"
        )


def _check_beside(scores_BS: Tensor, forced: dict[str, Tensor | None], carry: tuple[Tensor, ...]) -> None:
    shape, device = scores_BS.shape, scores_BS.device
    for name, mask in forced.items():
        if mask is not None and (mask.shape != shape or mask.device != device or mask.dtype != torch.bool):
            raise ValueError(f"select: {name} must be bool and fit, got {_say(mask)}, scores are {_say(scores_BS)}")
    if len(carry) > 2:
        raise ValueError(f"select: carry may hold two tensors, got {len(carry)}")
    for entries in carry:
        if entries.shape != shape or entries.device != device or entries.dtype not in _CARRY:
            raise ValueError(
                f"select: carry must be bool, int32 or int64 and fit, got {_say(entries)}, scores are {_say(scores_BS)}"
            )


def _check_values(scores_BS: Tensor, table_V: Tensor | None) -> None:
    scores = scores_BS if table_V is None else table_V
    nan = scores.isnan()
    if nan.any():
        where = "scores" if table_V is None else "table"
        raise ValueError(
            f"select: NaN in the {where} {tuple(scores.shape)}, first at {tuple(nan.nonzero()[0].tolist())}"
        )
    if table_V is not None and scores_BS.numel():
        low, high = (int(value) for value in scores_BS.aminmax())
        if low < 0 or high >= len(table_V):
            raise ValueError(
                f"select: ids {tuple(scores_BS.shape)} are {low}..{high}, the table has scores of 0..{len(table_V) - 1}"
            )

"""Choose the K positions of each row that go through the dropped layers."""

import torch
from torch import Tensor

from sctd_kernels.dispatch import backend
from sctd_kernels.select import reference
from sctd_kernels.select.reference import Selection

__all__ = ["Selection", "select"]

_BACKENDS = {"torch": reference.select}


def select(
    scores_BS: Tensor,
    keep: int,
    row_seed_B: Tensor,
    forced_keep_BS: Tensor | None = None,
    forced_drop_BS: Tensor | None = None,
) -> Selection:
    """Keep the `keep` highest-scored positions of each row, in ascending order of position.

    Positions in `forced_drop_BS` go first whatever their score, those in `forced_keep_BS` last (dropping wins where
    both are set). Equal scores, and forced positions among themselves, are ordered by a hash of (row seed, position),
    so that a choice does not depend on where in a batch, or on which rank, its row stands.

    Args:
        scores_BS: float32 (B, S), finite.
        keep: K, 1 <= K <= S.
        row_seed_B: int64 (B,), one seed per row.
        forced_keep_BS, forced_drop_BS: bool (B, S) or None.

    Raises:
        ValueError: K out of range, or shapes, devices or dtypes that do not fit.
    """
    if scores_BS.dim() != 2 or scores_BS.dtype.is_floating_point is False:
        raise ValueError(f"select: scores must be floating (B, S), got {scores_BS.dtype} {tuple(scores_BS.shape)}")
    rows, length = scores_BS.shape
    if not 1 <= keep <= length:
        raise ValueError(f"select: keep must be in 1..S, got keep={keep} for scores of shape {tuple(scores_BS.shape)}")
    device = scores_BS.device
    if row_seed_B.shape != (rows,) or row_seed_B.dtype != torch.int64 or row_seed_B.device != device:
        raise ValueError(
            f"select: row_seed must be int64 ({rows},) on {device}, got {row_seed_B.dtype} "
            f"{tuple(row_seed_B.shape)} on {row_seed_B.device} for scores {tuple(scores_BS.shape)}"
        )
    for name, mask in (("forced_keep", forced_keep_BS), ("forced_drop", forced_drop_BS)):
        if mask is not None and (mask.shape != scores_BS.shape or mask.device != device or mask.dtype != torch.bool):
            raise ValueError(
                f"select: {name} must be bool and fit, got {mask.dtype} {tuple(mask.shape)} on {mask.device}, "
                f"scores are {tuple(scores_BS.shape)} on {device}"
            )
    return _BACKENDS[backend()](scores_BS, keep, row_seed_B, forced_keep_BS, forced_drop_BS)

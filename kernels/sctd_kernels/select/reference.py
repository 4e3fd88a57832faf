"""Selection in plain torch.

Legend: B rows, S positions a row, K kept positions a row, N = S - K dropped ones, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sctd_kernels.hashing import hash_positions


def select(
    scores_BS: Tensor,
    keep: int,
    row_seed_B: Tensor,
    forced_keep_BS: Tensor | None,
    forced_drop_BS: Tensor | None,
    table_V: Tensor | None,
    carry: Sequence[Tensor],
) -> list[Tensor]:
    """The fields of a `Selection`: kept, dropped, inverse, and what is carried."""
    if table_V is not None:
        scores_BS = table_V[scores_BS.clamp(0, len(table_V) - 1)]
    key_BS = _sort_keys(scores_BS, row_seed_B, forced_keep_BS, forced_drop_BS)
    top_BK = key_BS.topk(keep, dim=1, sorted=False).indices
    is_kept_BS = torch.zeros_like(key_BS, dtype=torch.bool).scatter_(1, top_BK, True)
    # A stable sort of the flags lists the kept positions and then the dropped ones, each ascending.
    order_BS = torch.argsort(is_kept_BS.to(torch.uint8), dim=1, descending=True, stable=True)
    rank_BS = is_kept_BS.cumsum(1) - 1
    inverse_BS = torch.where(is_kept_BS, rank_BS, -1)
    kept_BK, dropped_BN = order_BS[:, :keep].contiguous(), order_BS[:, keep:].contiguous()
    return [kept_BK, dropped_BN, inverse_BS, *(entries_BS.gather(1, kept_BK) for entries_BS in carry)]


def _sort_keys(
    scores_BS: Tensor, row_seed_B: Tensor, forced_keep_BS: Tensor | None, forced_drop_BS: Tensor | None
) -> Tensor:
    """int64 (B, S), distinct within a row: the score as a monotone 32-bit integer above 32 bits of hash."""
    scores_BS = scores_BS.float()
    scores_BS = scores_BS.masked_fill(scores_BS.isnan(), float("-inf"))
    if forced_keep_BS is not None:
        scores_BS = scores_BS.masked_fill(forced_keep_BS, float("inf"))
    if forced_drop_BS is not None:
        scores_BS = scores_BS.masked_fill(forced_drop_BS, float("-inf"))
    bits_BS = (scores_BS + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, whose bits differ
    monotone_BS = bits_BS ^ ((bits_BS >> 31) & 0x7FFFFFFF)
    return (monotone_BS.long() << 32) | hash_positions(row_seed_B, scores_BS.shape[1])

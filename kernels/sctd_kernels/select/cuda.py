"""Selection by the CUDA C++ kernel of `cuda.cu`.

Legend: B rows, S positions a row, K kept positions a row, N = S - K dropped, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sctd_kernels.cuda_library import launch
from sctd_kernels.select.reference import Selection

# As in `Kind` of cuda.cu.
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int64: 4}


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
    carried = tuple(entries_BS.new_empty(rows, keep) for entries_BS in carry)
    if rows:
        moved: list[Tensor | int | None] = []
        for whole_BS, part_BK in zip(carry, carried, strict=True):
            moved += [whole_BS.contiguous(), part_BK, whole_BS.element_size()]
        moved += [None, None, 0] * (2 - len(carry))
        launch(
            "select",
            scores_BS.contiguous(),
            _KINDS[scores_BS.dtype],
            None if table_V is None else table_V.contiguous(),
            0 if table_V is None else len(table_V),
            row_seed_B.contiguous(),
            None if forced_keep_BS is None else forced_keep_BS.contiguous(),
            None if forced_drop_BS is None else forced_drop_BS.contiguous(),
            *moved,
            kept_BK,
            dropped_BN,
            inverse_BS,
            rows,
            length,
            keep,
        )
    return Selection(kept_BK, dropped_BN, inverse_BS, carried)

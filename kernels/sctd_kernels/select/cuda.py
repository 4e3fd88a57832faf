"""Selection by the CUDA C++ kernel of `cuda.cu`. Legend: B rows, S positions a row, V vocabulary."""

import torch
from torch import Tensor

from sctd_kernels.cuda_library import launch

# As in `Kind` of cuda.cu.
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int64: 4}


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
    moved: list[Tensor | int | None] = []
    for whole_BS, part_BK in zip(carry, results[3:], strict=True):
        moved += [whole_BS, part_BK, whole_BS.element_size()]
    moved += [None, None, 0] * (2 - len(carry))
    table = (table_V, 0 if table_V is None else len(table_V))
    inputs = (scores_BS, _KINDS[scores_BS.dtype], *table, row_seed_B, forced_keep_BS, forced_drop_BS)
    launch("select", *inputs, *moved, *results[:3], rows, length, keep)

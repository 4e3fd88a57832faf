"""Multi-head attention of some queries over a context, and who may attend to whom.

Positions of a row belong to segments (documents, say), and attend within their own. On GPUs a segment mask is a block
mask of FlexAttention, which skips blocks without a common segment; elsewhere, and for few queries, a dense one.

Legend: B rows, Q query positions, S context positions, D hidden size, H heads, d = D / H, h = d / 2.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sctd_kernels import rotate

Mask = Tensor | BlockMask
_FLEX_BLOCK = 128  # positions; below it a block mask has nothing to skip


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """On first use: looking for a compiler takes a second."""
    return torch.compile(function)


def segment_mask(query_BQ: Tensor, key_BS: Tensor) -> Mask:
    """Queries of segments `query_BQ` may attend to the keys whose segment in `key_BS` is the same."""
    if query_BQ.device.type != "cuda" or query_BQ.shape[1] < _FLEX_BLOCK:
        return query_BQ[:, None, :, None] == key_BS[:, None, None, :]
    return flex_mask(query_BQ, key_BS, _compiled(create_block_mask))


def flex_mask(query_BQ: Tensor, key_BS: Tensor, create: Callable[..., BlockMask] = create_block_mask) -> BlockMask:
    def same_segment(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query_BQ[row, query] == key_BS[row, key]

    batch, queries = query_BQ.shape
    return create(same_segment, batch, None, queries, key_BS.shape[1], device=query_BQ.device)


def window_mask(query_BQ: Tensor, key_BS: Tensor, half: int) -> Tensor:
    """Queries at these places may attend to the keys that are at most `half` places away: bool (B, 1, Q, S)."""
    return (query_BQ[:, None, :, None] - key_BS[:, None, None, :]).abs() <= half


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Any:
    attend: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=mask)


class StackedLinear(nn.Linear):
    """Several linear maps of one input in one product. Optimizers that look at matrices ask it for their number.

    Args:
        outputs: of each map. parts: how many there are.
    """

    def __init__(self, inputs: int, outputs: int, parts: int, bias: bool) -> None:
        super().__init__(inputs, parts * outputs, bias)
        self.parts = parts


class Attention(nn.Module):
    """Multi-head attention of Q queries over a context of S positions.

    Args:
        table_2Sh: float32, cosines and sines of rotary positions (`sctd_kernels.rotary_table`); None: no rotation. No
            buffer: the engine would round it to its own precision.
        bias: of all projections.
        window: places that a query attends to, half of them on each side; 0: all.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        table_2Sh: Tensor | None = None,
        bias: bool = True,
        window: int = 0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.half_window = window // 2
        self.rotary = None if table_2Sh is None else Rotary(table_2Sh)
        self.query = nn.Linear(width, width, bias)
        self.key_value = StackedLinear(width, width, 2, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(
        self, x_BQD: Tensor, context_BSD: Tensor | None, mask: Mask | None, place_BQ: Tensor | None = None
    ) -> Tensor:
        """(B, Q, D), (B, S, D) -> (B, Q, D).

        Args:
            context_BSD: None: the queries are their own context.
            place_BQ: int64, the places of the queries in their row, for rotary positions and windows; None: at 0..Q-1.
                A context of its own is at 0..S-1.
        """
        k, v = (
            self._split(part) for part in self.key_value(x_BQD if context_BSD is None else context_BSD).chunk(2, dim=-1)
        )
        q = self._split(self.query(x_BQD))
        if self.rotary is not None:
            q, k = self.rotary(q, place_BQ), self.rotary(k, place_BQ if context_BSD is None else None)
        if self.half_window:
            mask = self._near(mask, q, k, place_BQ, context_BSD is None)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if isinstance(mask, BlockMask):
            mixed_BHQd = _attend_in_blocks(q, k, v, mask)
        else:
            rate = self.dropout if self.training else 0.0
            mixed_BHQd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.out(mixed_BHQd.transpose(1, 2).reshape(x_BQD.shape))

    def _near(
        self, mask: Mask | None, q_BQHd: Tensor, k_BSHd: Tensor, place_BQ: Tensor | None, is_own: bool
    ) -> Mask | None:
        """`mask`, and no further than half a window."""
        if k_BSHd.shape[1] <= self.half_window and place_BQ is None:
            return mask
        row_1Q, row_1S = (torch.arange(x.shape[1], device=x.device)[None] for x in (q_BQHd, k_BSHd))
        query_BQ = row_1Q if place_BQ is None else place_BQ
        near = window_mask(query_BQ, query_BQ if is_own else row_1S, self.half_window)
        assert not isinstance(mask, BlockMask), "windows and block masks do not go together"
        return near if mask is None else near & mask

    def _split(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        return x_BTD.view(batch, length, self.heads, width // self.heads)


class Rotary:
    """Rotary positions (Su et al. 2021): holds the table where no module's casts reach it."""

    def __init__(self, table_2Sh: Tensor) -> None:
        self.table_2Sh = table_2Sh

    def __call__(self, x_BTHd: Tensor, place_BT: Tensor | None) -> Tensor:
        return rotate(x_BTHd, self.table_2Sh, place_BT)

"""Multi-head attention of some queries over a context, and who may attend to whom.

Positions of a row belong to segments (documents, say), and attend within their own. On GPUs a segment mask is a block
mask of FlexAttention, which skips blocks without a common segment; elsewhere, and for few queries, a dense one.

Legend: B rows, Q query positions, S context positions, D hidden size, H heads, d = D / H.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask
_FLEX_BLOCK = 128  # positions; below it a block mask has nothing to skip


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """On first use: to ask for a compiler takes a second."""
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


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Any:
    attend: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=mask)


class Attention(nn.Module):
    """Multi-head attention of Q queries over a context of S positions."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BQD: Tensor, context_BSD: Tensor, mask: Mask | None) -> Tensor:
        k, v = (self._split(part) for part in self.key_value(context_BSD).chunk(2, dim=-1))
        q = self._split(self.query(x_BQD))
        if isinstance(mask, BlockMask):
            mixed_BHQd = _attend_in_blocks(q, k, v, mask)
        else:
            rate = self.dropout if self.training else 0.0
            mixed_BHQd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.out(mixed_BHQd.transpose(1, 2).reshape(x_BQD.shape))

    def _split(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        return x_BTD.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

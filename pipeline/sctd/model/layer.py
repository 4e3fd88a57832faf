"""What the layers of both families share: how they are called, and recomputation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sctd.model.attention import Mask


class EncoderLayer(nn.Module):
    """A layer takes its queries apart from its context: (B, Q, D) that attend to (B, S, D) -> (B, Q, D).

    Token dropping and the last layer's short output are this and no more.

    Args:
        attention_dropout: its rate; all other dropout is a hash of the row seeds.
        recompute: forget the activations, and compute them again in the backward.
    """

    compute: Callable[..., Tensor]  # the family's: what `forward` does, recomputation apart

    def __init__(self, attention_dropout: float, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self._keep_random = attention_dropout > 0

    def forward(
        self,
        x_BQD: Tensor,
        context_BSD: Tensor | None = None,
        mask: Mask | None = None,
        row_seed_B: Tensor | None = None,
        place_BQ: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, D) -> (B, Q, D).

        Args:
            context_BSD: what the queries attend to; None for themselves.
            mask: who may attend to whom; None for all to all.
            row_seed_B: int64, seeds of the dropout; without them, and in evaluation, nothing is dropped.
            place_BQ: int64, the places of the queries in their row; None: 0..Q-1. For rotary positions.
        """
        arguments: Any = (x_BQD, context_BSD, mask, row_seed_B if self.training else None, place_BQ)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, *arguments, use_reentrant=False, preserve_rng_state=self._keep_random)
        return self.compute(*arguments)

    def read(self, x_BTD: Tensor) -> Tensor:
        """States that enter the layer as its attention sees them: (..., D) -> (..., D)."""
        return x_BTD

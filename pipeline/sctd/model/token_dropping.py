"""Token dropping: the middle layers of an encoder run on part of the tokens only (Hou et al. 2022).

Layers are numbered from 0. The trunk, `0 .. first_dropped-1`, and the tail, the last `full_tail`, see all tokens. Of
the layers between, the first one updates the kept tokens while its keys and values still come from all of them; the
others see the kept tokens alone. At the end the kept rows take their new state and the others leave as they came in.

random-LTD (Yao et al. 2022) instead draws a new subset for each middle layer and merges after each.

Legend: B rows, S positions, K kept positions, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sctd.errors import UserError
from sctd_kernels import gather, gather_rows, merge, mix_rows, select

MULTIPLE = 16  # of K: keeps matrix shapes friendly to tensor cores


@dataclass(frozen=True)
class LayerPlan:
    """Which layers drop: `first_dropped .. layers - full_tail - 1`."""

    layers: int
    first_dropped: int
    full_tail: int

    @property
    def middle(self) -> slice:
        return slice(self.first_dropped, self.layers - self.full_tail)

    @property
    def tail(self) -> slice:
        return slice(self.layers - self.full_tail, self.layers)


def kept_tokens(keep_ratio: float, length: int) -> int:
    """K of a row of `length` tokens: keep_ratio x S rounded to a multiple of 16, at least 16 and at most S.

    Raises:
        UserError: a ratio that keeps nothing or more than there is.
    """
    if not 0 < keep_ratio <= 1:
        raise UserError(f"model.keep_ratio is {keep_ratio}: it must be above 0 and at most 1")
    if keep_ratio == 1:
        return length
    return min(length, max(MULTIPLE, round(keep_ratio * length / MULTIPLE) * MULTIPLE))


class TokenDropping:
    """Runs a stack of layers on the kept tokens. Holds no parameters: a token-dropped model is a plain BERT.

    Args:
        always_keep: vocabulary ids kept whatever their score ([CLS], [SEP], [MASK], [UNK]).
        pad: id that is dropped before any other.
        per_layer: draw a new random subset for each layer (random-LTD), no id being special but `pad`.
    """

    def __init__(self, always_keep: Sequence[int], pad: int, per_layer: bool = False) -> None:
        self.always_keep = tuple(always_keep)
        self.pad = pad
        self.per_layer = per_layer

    def __call__(
        self,
        layers: nn.ModuleList,
        hidden_BSD: Tensor,
        ids_BS: Tensor,
        scores_BS: Tensor,
        row_seed_B: Tensor,
        keep: int,
        key_mask_BS: Tensor | None = None,
        first_BSD: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D).

        Args:
            ids_BS: the (corrupted) token ids that the model sees.
            scores_BS: float32 importance of each position; all zeros for a random choice.
            row_seed_B: int64, orders ties.
            keep: K.
            key_mask_BS: True where a token may be attended to.
            first_BSD: output of `layers[0]` at all positions, where the caller has it. Its kept rows are what that
                layer would compute here, queries being independent of each other, so it does not run again.
        """
        if self.per_layer:
            for number, layer in enumerate(layers):
                seed_B = mix_rows(row_seed_B, number)
                hidden_BSD = self._one_layer(layer, hidden_BSD, ids_BS, scores_BS, seed_B, keep, key_mask_BS)
            return hidden_BSD

        selection = select(scores_BS, keep, row_seed_B, self._forced(ids_BS), ids_BS == self.pad)
        kept_mask_BK = None if key_mask_BS is None else key_mask_BS.gather(1, selection.kept_BK)
        if first_BSD is None:
            kept_BKD = layers[0](gather(hidden_BSD, selection), hidden_BSD, key_mask_BS)
        else:
            kept_BKD = gather(first_BSD, selection)
        for layer in layers[1:]:
            kept_BKD = layer(kept_BKD, key_mask_BS=kept_mask_BK)
        return merge(hidden_BSD, kept_BKD, selection)

    def _one_layer(
        self,
        layer: nn.Module,
        hidden_BSD: Tensor,
        ids_BS: Tensor,
        scores_BS: Tensor,
        row_seed_B: Tensor,
        keep: int,
        key_mask_BS: Tensor | None,
    ) -> Tensor:
        selection = select(scores_BS, keep, row_seed_B, None, ids_BS == self.pad)
        kept_mask_BK = None if key_mask_BS is None else key_mask_BS.gather(1, selection.kept_BK)
        return merge(hidden_BSD, layer(gather_rows(hidden_BSD, selection.kept_BK), key_mask_BS=kept_mask_BK), selection)

    def _forced(self, ids_BS: Tensor) -> Tensor:
        forced_BS = ids_BS == self.always_keep[0]
        for special in self.always_keep[1:]:
            forced_BS = torch.logical_or(forced_BS, ids_BS == special)
        return forced_BS

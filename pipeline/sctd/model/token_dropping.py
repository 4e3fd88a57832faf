"""Token dropping: the middle layers of an encoder run on part of the tokens only (Hou et al. 2022).

Layers are numbered from 0. The trunk, `0 .. first_dropped-1`, and the tail, the last `full_tail`, see all tokens. Of
the layers between, the first one updates the kept tokens while its keys and values still come from all of them; the
others see the kept tokens alone. At the end the kept rows take their new state and the others leave as they came in.
Kept tokens keep their places: where positions are rotations, they turn by those of the whole row.

random-LTD (Yao et al. 2022) instead draws a new subset for each middle layer and merges after each.

Legend: B rows, S positions, K kept positions, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sctd.errors import UserError
from sctd.model.attention import Mask, segment_mask
from sctd_kernels import Selection, gather, merge, mix_rows, select, split

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
        vocab_size: V.
        always_keep: vocabulary ids kept whatever their score ([CLS], [SEP], [MASK], [UNK]).
        pad: id that is dropped before any other.
        per_layer: draw a new random subset for each layer (random-LTD), no id being special but `pad`.
    """

    def __init__(
        self,
        vocab_size: int,
        always_keep: Sequence[int],
        pad: int,
        per_layer: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pad = pad
        self.per_layer = per_layer
        forced_V = torch.zeros(vocab_size)
        forced_V[[] if per_layer else list(always_keep)] = float("inf")
        forced_V[pad] = float("-inf")
        self._forced_V = forced_V.to(device)

    def __call__(
        self,
        layers: nn.ModuleList,
        hidden_BSD: Tensor,
        ids_BS: Tensor,
        scores_V: Tensor | None,
        row_seed_B: Tensor,
        keep: int,
        segments_BS: Tensor | None = None,
        first_BSD: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D).

        Args:
            ids_BS: the (corrupted) token ids that the model sees.
            scores_V: float32 importance of each id, finite; None for a random choice.
            row_seed_B: int64, orders ties and seeds dropout.
            keep: K.
            segments_BS: tokens attend within equal segments; None for all to all.
            first_BSD: output of `layers[0]` at all positions, where the caller has it. Its kept rows are what that
                layer would compute here, queries being independent of each other, so it does not run again.
        """
        ranking_V = self._forced_V if scores_V is None else scores_V + self._forced_V
        if self.per_layer:
            for number, layer in enumerate(layers):
                seed_B = mix_rows(row_seed_B, number)
                selection = _choose(ids_BS, ranking_V, keep, seed_B, segments_BS)
                kept_BKD, rest_BSD = split(hidden_BSD, selection)
                kept_BKD = layer(kept_BKD, None, _mask(selection.carried), seed_B, selection.kept_BK)
                hidden_BSD = merge(rest_BSD, kept_BKD, selection)
            return hidden_BSD

        selection = _choose(ids_BS, ranking_V, keep, row_seed_B, segments_BS)
        if first_BSD is None:
            kept_BKD, rest_BSD = split(hidden_BSD, selection)
            first_mask = _mask(selection.carried, segments_BS)
            context_BSD = hidden_BSD if keep < ids_BS.shape[1] else None  # all kept: bit for bit the full path
            kept_BKD = layers[0](kept_BKD, context_BSD, first_mask, row_seed_B, selection.kept_BK)
        else:
            kept_BKD, rest_BSD = gather(first_BSD, selection), hidden_BSD
        mask = _mask(selection.carried)
        for layer in layers[1:]:
            kept_BKD = layer(kept_BKD, None, mask, row_seed_B, selection.kept_BK)
        return merge(rest_BSD, kept_BKD, selection)


def _choose(ids_BS: Tensor, ranking_V: Tensor, keep: int, row_seed_B: Tensor, segments_BS: Tensor | None) -> Selection:
    carry = () if segments_BS is None else (segments_BS,)
    return select(ids_BS, keep, row_seed_B, table_V=ranking_V, carry=carry)


def _mask(kept: tuple[Tensor, ...], keys_BS: Tensor | None = None) -> Mask | None:
    """Of kept tokens over keys, by default over themselves; `kept` holds their segments, or nothing."""
    return segment_mask(kept[0], kept[0] if keys_BS is None else keys_BS) if kept else None

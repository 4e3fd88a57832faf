"""Sizes and rates that define an encoder."""

from dataclasses import dataclass

_LONG = 512  # positions; beyond them rotary positions turn more slowly, so that far tokens stay apart
_THETA, _THETA_LONG = 10_000.0, 160_000.0


@dataclass(frozen=True)
class BertShape:
    """Of a BERT of either family.

    Args:
        family: bert (Devlin et al. 2019) or modernbert (Warner et al. 2024, all layers with full attention).
        intermediate_size: E; in a modernbert the width after the gate.
        positions: how a bert's table of positions begins: learned (like all weights) or sinusoidal.
        theta: base of rotary positions (modernbert); None: 10,000 for up to 512 positions, 160,000 beyond.
        window: tokens that a local layer attends to, half of them on each side (modernbert); 0: no layer is local.
        global_every: where there are windows, every so many-th layer is global, from the first. local_theta: base of
            rotary positions in the local ones.
    """

    vocab_size: int
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    max_positions: int
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    family: str = "bert"
    positions: str = "learned"
    theta: float | None = None
    window: int = 0
    global_every: int = 3
    local_theta: float = _THETA

    @property
    def is_modern(self) -> bool:
        return self.family == "modernbert"

    def is_local(self, layer: int) -> bool:
        """Whether this layer, from 0, attends within a window."""
        return self.window > 0 and layer % self.global_every > 0

    @property
    def rotary_theta(self) -> float:
        if self.theta is not None:
            return self.theta
        return _THETA if self.max_positions <= _LONG else _THETA_LONG

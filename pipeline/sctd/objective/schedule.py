"""The hybrid schedule: optimizer step -> phase and number of kept tokens."""

from enum import StrEnum
from typing import Any

from sctd.model.token_dropping import kept_tokens


class Phase(StrEnum):
    FULL = "full"  # all layers see all tokens
    DROP = "drop"  # the token-dropping path
    ALIGN = "align"  # both paths, the full one teaching the dropping one


class HybridScheduleHook:
    """A forward pre-hook on the engine that tells each micro-batch its phase.

    The phase belongs to the optimizer step, t = engine.global_steps + 1: all its micro-batches and all ranks share
    it, and it survives a resume at any step because it is a function of t alone. ALIGN when t mod F == 0, else DROP;
    an arm that drops nothing, and every evaluation, is FULL.

    Args:
        interval: F; 0 for an arm without ALIGN steps.
        keep_ratio: share of the tokens kept, at the start where `grow_steps` is set.
        grow_steps: number of steps over which the share rises linearly to 1; 0 keeps it.
        length: S, tokens a row, but for steps that train on rows of another length.
    """

    def __init__(self, drops: bool, interval: int, keep_ratio: float, length: int, grow_steps: int = 0) -> None:
        self.drops = drops
        self.interval = interval
        self.keep_ratio = keep_ratio
        self.length = length
        self.grow_steps = grow_steps

    def phase(self, step: int) -> Phase:
        """Phase of optimizer step `step`, counted from 1."""
        if not self.drops:
            return Phase.FULL
        return Phase.ALIGN if self.interval and step % self.interval == 0 else Phase.DROP

    def keep(self, step: int, length: int | None = None) -> int:
        """K at optimizer step `step`, of rows of `length` tokens (None: S)."""
        grown = min(1.0, step / self.grow_steps) if self.grow_steps else 0.0
        return kept_tokens(self.keep_ratio + (1 - self.keep_ratio) * grown, length or self.length)

    def __call__(self, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        step = engine.global_steps + 1
        phase = self.phase(step) if engine.module.training else Phase.FULL
        return args, {**kwargs, "phase": phase, "keep": self.keep(step, kwargs["input_ids"].shape[1])}

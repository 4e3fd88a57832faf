"""The hybrid schedule: optimizer step -> phase and number of kept tokens."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sctd.model.token_dropping import kept_tokens
from sctd.schedule import Schedule


class Phase(StrEnum):
    FULL = "full"  # all layers see all tokens
    DROP = "drop"  # the token-dropping path
    ALIGN = "align"  # both paths, the full one teaching the dropping one


@dataclass(eq=False)
class HybridScheduleHook:
    """A forward pre-hook on the engine that gives each micro-batch its phase.

    The phase belongs to the optimizer step, t = engine.global_steps + 1: all its micro-batches and all ranks share it,
    and it survives a resume at any step because it is a function of t alone. An arm that drops has a full start, then
    ALIGN where t mod F == 0 and else DROP, then a full finish. Any other arm, and every evaluation, is FULL.

    Args:
        interval: F; 0 for an arm without ALIGN steps.
        keep_ratio: share of the tokens kept in dropping steps.
        length: S, tokens a row, but for steps that train on rows of another length.
        dropping: the first and the last optimizer step between full start and full finish.

    Attributes:
        phase: of each optimizer step.
    """

    drops: bool
    interval: int
    keep_ratio: Schedule[float]
    length: int
    dropping: tuple[int, int] = (1, sys.maxsize)

    def __post_init__(self) -> None:
        first, last = self.dropping
        between: list[Any] = [(first, self._between), (last + 1, Phase.FULL)] if self.drops and first <= last else []
        self.phase: Schedule[Phase] = Schedule((1, Phase.FULL), *between)

    def _between(self, step: int) -> Phase:
        return Phase.ALIGN if self.interval and step % self.interval == 0 else Phase.DROP

    def keep(self, step: int, length: int | None = None) -> int:
        """K at optimizer step `step`, of rows of `length` tokens (None: S)."""
        return kept_tokens(self.keep_ratio(step), length or self.length)

    def __call__(self, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        step = engine.global_steps + 1
        phase = self.phase(step) if engine.module.training else Phase.FULL
        return args, {**kwargs, "phase": phase, "keep": self.keep(step, kwargs["input_ids"].shape[1])}

"""Functions of the optimizer step: learning rate, mask rate, share of kept tokens, length of rows and phase.

All that changes in the course of a run is one of these, so that nothing of it needs to be saved or replayed.
"""

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sctd.config import ScheduleConfig

T = TypeVar("T")


class Schedule(Generic[T]):
    """Stages, each a constant or itself a function of the step.

    Args:
        stages: (the first optimizer step that it holds for, counted from 1; the value, or a function of the step). Of
            stages that begin at the same step the last one holds.
    """

    def __init__(self, *stages: tuple[int, T | Callable[[int], T]]) -> None:
        self.stages: list[tuple[int, Any]] = sorted(stages, key=lambda stage: stage[0])

    def __call__(self, step: int) -> T:
        """The value at an optimizer step, counted from 1."""
        value = next(value for start, value in reversed(self.stages) if start <= max(step, self.stages[0][0]))
        return value(step) if callable(value) else value

    @property
    def starts(self) -> list[int]:
        """The first steps of the stages."""
        return [start for start, _ in self.stages]


def ramp(first: int, last: int, start: float, end: float, shape: Callable[[float], float] | None = None) -> Any:
    """From `start` at step `first` to `end` at step `last`, and `end` from there on; a straight line, or a `shape` that
    maps the share of the way that is left (1 to 0) to the share of the difference that is left."""

    def value(step: int) -> float:
        left = 1 - min(1.0, max(0.0, (step - first) / max(1, last - first)))
        return end + (start - end) * (left if shape is None else shape(left))

    return value


def learning_rate(config: ScheduleConfig, peak: float, steps: int) -> Schedule[float]:
    """The rate over a horizon of `steps`.

    Linear warm-up to `peak`, then: `linear`, `polynomial` (of `power`) or `cosine` decay, or `wsd`: constant, with a
    linear decay over the last `decay_steps`. A decay would arrive at `final_lr` one step after the horizon: the last
    step trains too.
    """
    warmup = config.warmup_steps
    start = steps - config.decay_steps if config.name == "wsd" else warmup
    shapes = {
        "cosine": lambda left: 0.5 * (1 + math.cos(math.pi * (1 - left))),
        "polynomial": lambda left: left**config.power,
    }
    decay = ramp(start, steps + 1, peak, config.final_lr, shapes.get(config.name))
    if config.name == "wsd" and not config.decay_steps:
        return Schedule((1, ramp(0, warmup, 0.0, peak)), (warmup + 1, peak))
    return Schedule((1, ramp(0, warmup, 0.0, peak)), (warmup + 1, peak), (start + 1, decay))

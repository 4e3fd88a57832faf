"""Learning rate as a function of the step alone: nothing to save, nothing to replay."""

import math

from sctd.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Rate at optimizer step `step` (counted from 1) of a horizon of `steps`.

    Linear warm-up to `peak`, then: `linear`, `polynomial` (of `power`) or `cosine` decay to `final_lr` at the
    horizon, or `wsd`: constant, with a linear decay over the last `decay_steps`.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    start = steps - schedule.decay_steps if schedule.name == "wsd" else schedule.warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    if schedule.name == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif schedule.name == "polynomial":
        left = (1 - done) ** schedule.power
    else:
        left = 1 - done
    return schedule.final_lr + (peak - schedule.final_lr) * left

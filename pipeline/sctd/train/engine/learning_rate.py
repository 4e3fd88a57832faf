"""Learning rate as a schedule: nothing to save, nothing to replay."""

import math

from sctd.config import ScheduleConfig
from sctd.schedule import Schedule, ramp


def learning_rate(config: ScheduleConfig, peak: float, steps: int) -> Schedule[float]:
    """The rate over a horizon of `steps`.

    Linear warm-up to `peak`, then: `linear`, `polynomial` (of `power`) or `cosine` decay, or `wsd`: constant, with a
    linear decay over the last `decay_steps`. A decay would arrive at `final_lr` one step behind the horizon: the last
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

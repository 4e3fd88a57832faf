"""The kinds of optimizer steps that a run has, and how often each occurs."""

from collections import Counter, defaultdict
from itertools import pairwise
from typing import NamedTuple

from sctd.config import Config
from sctd.data.masking import mask_share
from sctd.model.shape import BertShape
from sctd.objective.build import build_hook
from sctd.objective.flops import StepFlops, step_flops
from sctd.objective.schedule import Phase

_SAMPLES = 1000  # of the schedule of K


class Step(NamedTuple):
    """`work`: counts of a row, with as many targets as it has at such a step. `keep`: K; S in a FULL step."""

    work: StepFlops
    phase: Phase
    keep: int


def shares(config: Config, shape: BertShape, length: int) -> dict[Step, float]:
    """The kinds on rows of `length` tokens, in the order of their first steps, with their shares of all steps; a K that
    grows is sampled."""
    hook, masked, end = build_hook(config, length), mask_share(config), config.train.steps + 1
    found: defaultdict[Step, float] = defaultdict(float)
    for first, behind in pairwise(sorted({*hook.phase.starts, *masked.starts, end})):
        work, steps = step_flops(config, shape, length, masked(first)), range(first, behind)
        aligned = ((behind - 1) // hook.interval - (first - 1) // hook.interval) / len(steps) if hook.interval else 0.0
        samples = steps[:: max(1, len(steps) // _SAMPLES)]
        for keep, times in Counter(map(hook.keep, samples)).items():
            share = len(steps) / (end - 1) * times / len(samples)
            if hook.phase(first) is Phase.FULL:
                found[Step(work, Phase.FULL, length)] += share
            else:
                found[Step(work, Phase.DROP, keep)] += share * (1 - aligned)
                found[Step(work, Phase.ALIGN, keep)] += share * aligned
    return {step: share for step, share in found.items() if share}

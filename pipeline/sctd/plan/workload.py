"""What a run computes: the kinds of its optimizer steps, and how often each occurs."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from sctd.config import Config
from sctd.data.masking import mask_share
from sctd.objective.build import build_hook, shape_of
from sctd.objective.schedule import Phase
from sctd.train.flops import StepFlops, step_flops

_SAMPLES = 1000  # of the schedule of K
_VOCABULARY = 30522  # BERT's, if neither recipe nor corpus says


class Step(NamedTuple):
    """`work`: counts of a row, with as many targets as it has at such a step. `keep`: K; S in a FULL step."""

    work: StepFlops
    phase: Phase
    keep: int


@dataclass(frozen=True)
class Workload:
    """`steps`: the kinds, in the order in which they begin, with their shares of all steps."""

    config: Config
    steps: dict[Step, float]

    @property
    def work(self) -> StepFlops:
        """Of the first step; shape, length and recomputation are the same in all."""
        return next(iter(self.steps)).work

    def mean(self) -> float:
        """Model FLOPs of a row, over the schedule."""
        return sum(share * work.row(phase, keep) for (work, phase, keep), share in self.steps.items())

    def executed(self) -> float:
        """The same for all that is computed, recomputation included."""
        return sum(share * work.hardware_row(phase, keep) for (work, phase, keep), share in self.steps.items())


def make_workload(config: Config, length: int) -> Workload:
    """The workload of a recipe on rows of `length` tokens; a K that grows is sampled."""
    shape = shape_of(config, config.model.vocab_size or _VOCABULARY)
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
    return Workload(config, {step: share for step, share in found.items() if share})

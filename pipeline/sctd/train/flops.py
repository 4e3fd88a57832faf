"""Floating-point operations of a run up to any of its steps, by the formula of each step's phase."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from sctd.config import Config
from sctd.corpus.manifest import Manifest
from sctd.objective.build import build_hook
from sctd.objective.schedule import HybridScheduleHook, Phase
from sctd.train.accounting import step_flops
from sctd.train.export import bert_shape, row_lengths


@dataclass(frozen=True)
class _Stretch:
    """Steps `first` to `last` (both included) on rows of one length with one K.

    plain, align: model FLOPs of a step, of the phases that the arm has.
    """

    first: int
    last: int
    plain: float
    align: float

    def until(self, step: int, interval: int) -> float:
        """FLOPs of its steps up to this one."""
        last = min(step, self.last)
        if last < self.first:
            return 0.0
        aligned = last // interval - (self.first - 1) // interval if interval else 0
        return (last - self.first + 1 - aligned) * self.plain + aligned * self.align


def flops_until(config: Config, manifest: Manifest, steps: Sequence[int]) -> list[float]:
    """Model FLOPs, forward and backward, of a run's first steps, for each number of them.

    Counts rows of the warm-up's length, ALIGN steps and a K that grows, as the training's own MFU does.
    """
    lengths = row_lengths(config, manifest)
    hook, warmup = build_hook(config, lengths[0]), config.data.warmup_steps
    end = max(steps, default=0)
    stretches = [
        *_stretches(config, manifest, hook, lengths[-1], 1, min(warmup, end)),
        *_stretches(config, manifest, hook, lengths[0], warmup + 1, end),
    ]
    return [sum(stretch.until(step, hook.interval) for stretch in stretches) for step in steps]


def saving(cost: float | None, whole: float | None) -> float | None:
    """Share of the baseline's cost (its FLOPs or hours) that a run saves, negative where it costs more; None where one
    of them is not known."""
    return 1 - cost / whole if cost is not None and whole else None


def _stretches(
    config: Config, manifest: Manifest, hook: HybridScheduleHook, length: int, first: int, last: int
) -> list[_Stretch]:
    """Of the steps from `first` to `last` on rows of `length` tokens: one for each K, which never falls."""
    work, rows = step_flops(config, bert_shape(config, manifest), length), config.train.batch_size
    plain = Phase.DROP if hook.drops else Phase.FULL
    found = []
    while first <= last:
        keep = hook.keep(first, length)
        end = bisect_right(range(last + 1), keep, lo=first, key=lambda step: hook.keep(step, length)) - 1
        costs = rows * work.row(plain, keep), rows * work.row(Phase.ALIGN, keep)
        found.append(_Stretch(first, end, *costs))
        first = end + 1
    return found

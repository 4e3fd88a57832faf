"""Floating-point operations of a run, by the formula of each step's phase, row length and number of targets."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sctd.config import Config
from sctd.corpus.manifest import Manifest
from sctd.data.masking import mask_share
from sctd.model.shape import BertShape
from sctd.objective.build import build_hook
from sctd.objective.schedule import Phase
from sctd.schedule import Schedule
from sctd.train.accounting import StepFlops, step_flops
from sctd.train.export import bert_shape, row_lengths


@dataclass(frozen=True)
class _Stretch:
    """Steps `first` to `last` (both included) that cost the same but for their ALIGN steps.

    plain, align: model FLOPs of a step. interval: of the ALIGN steps among them; 0: none.
    """

    first: int
    last: int
    plain: float
    align: float
    interval: int

    def until(self, step: int) -> float:
        """FLOPs of its steps up to this one."""
        last = min(step, self.last)
        if last < self.first:
            return 0.0
        aligned = last // self.interval - (self.first - 1) // self.interval if self.interval else 0
        return (last - self.first + 1 - aligned) * self.plain + aligned * self.align


class Work:
    """What each optimizer step of a run costs, over all ranks.

    Args:
        lengths: tokens a row, and of the warm-up's rows where there is one.
    """

    def __init__(self, config: Config, shape: BertShape, lengths: Sequence[int]) -> None:
        self._hook, self._rows, self._steps = (
            build_hook(config, lengths[0]),
            config.train.batch_size,
            config.train.steps,
        )
        self._length = Schedule((1, lengths[-1]), (config.data.warmup_steps + 1, lengths[0]))
        shares = mask_share(config)
        starts = sorted({*self._length.starts, *shares.starts})
        counts = [(start, step_flops(config, shape, self._length(start), shares(start))) for start in starts]
        self._counts: Schedule[StepFlops] = Schedule(*counts)
        self._stretches: list[_Stretch] | None = None

    def step(self, number: int) -> tuple[float, float]:
        """Model FLOPs of an optimizer step, and FLOPs that are executed, forward and backward."""
        phase, keep = self._hook.phase(number), self._hook.keep(number, self._length(number))
        count = self._counts(number)
        return self._rows * count.row(phase, keep), self._rows * count.hardware_row(phase, keep)

    def until(self, number: int) -> float:
        """Model FLOPs of the first steps."""
        if self._stretches is None:
            self._stretches = self._divide()
        return sum(stretch.until(number) for stretch in self._stretches)

    def seconds_left(self, record: dict[str, Any], goal: int) -> float:
        """From a record of the metrics to step `goal`, at the record's FLOPs a second."""
        left = self.until(goal) - self.until(record["step"])
        if not record.get("flops_per_s"):  # a record of an earlier version
            return float(record["step_seconds"]) * (goal - record["step"])
        return left / float(record["flops_per_s"])

    def _divide(self) -> list[_Stretch]:
        hook, end = self._hook, self._steps
        starts = sorted({*self._counts.starts, *hook.phase.starts})
        found = []
        for first, behind in zip(starts, [*starts[1:], end + 1], strict=True):
            first, last, count, length = max(1, first), min(behind - 1, end), self._counts(first), self._length(first)
            drops = hook.phase(first) is not Phase.FULL
            plain, interval = (Phase.DROP, hook.interval) if drops else (Phase.FULL, 0)
            while first <= last:  # one for each K, which never falls
                keep = hook.keep(first, length)
                same = last
                if drops:
                    same = bisect_right(range(last + 1), keep, lo=first, key=lambda step: hook.keep(step, length)) - 1
                costs = self._rows * count.row(plain, keep), self._rows * count.row(Phase.ALIGN, keep)
                found.append(_Stretch(first, same, *costs, interval))
                first = same + 1
        return found


def flops_until(config: Config, manifest: Manifest, steps: Sequence[int]) -> list[float]:
    """Model FLOPs, forward and backward, of a run's first steps, for each number of them."""
    work = Work(config, bert_shape(config, manifest), row_lengths(config, manifest))
    return [work.until(step) for step in steps]


def saving(cost: float | None, whole: float | None) -> float | None:
    """Share of the baseline's cost (its FLOPs or hours) that a run saves, negative where it costs more; None where one
    of them is not known."""
    return 1 - cost / whole if cost is not None and whole else None

"""Floating-point operations by formula: of a step, from its shapes, and of a run, from its phases and row lengths.

A multiply-add counts as two. Forward and backward are counted as three forwards. Only matrix products count.
Legend: S positions a row, K kept, Q query positions, M predicted positions, D hidden size, V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sctd.config import Config
from sctd.corpus.manifest import Manifest
from sctd.data.masking import mask_share, target_count
from sctd.model.shape import BertShape
from sctd.model.token_dropping import LayerPlan
from sctd.objective.arms import ARMS, KeepBy
from sctd.objective.build import bert_shape, build_hook, row_lengths, shape_of
from sctd.objective.schedule import Phase
from sctd.schedule import Schedule


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one row, forward and backward, by phase.

    Args:
        targets: M. outputs: Q of the last layer (1 + M, or S where it is computed in full).
        per_layer: every middle layer sees K tokens only (random-LTD), its first one too.
        recompute: whether the backward runs each layer's forward again.
    """

    shape: BertShape
    plan: LayerPlan
    length: int
    targets: int
    outputs: int
    align_full: bool = True
    per_layer: bool = False
    recompute: bool = False

    def row(self, phase: Phase, keep: int) -> float:
        """Model FLOPs: what the arm's mathematics needs, however it is computed."""
        return 3.0 * (self._encoder(phase, keep) + self.heads(phase) * self._head())

    def hardware_row(self, phase: Phase, keep: int) -> float:
        """FLOPs that are executed: those of `row`, and of the layers that are computed again for the backward.

        What attention kernels compute again within themselves is not counted.
        """
        return self.row(phase, keep) + (self._again(phase, keep) if self.recompute else 0.0)

    def layers(self, phase: Phase, keep: int) -> list[tuple[int, int]]:
        """(queries, context) of each layer that runs; an ALIGN step runs some of them on both paths."""
        whole = (self.length, self.length)
        middle = self.plan.layers - self.plan.first_dropped - self.plan.full_tail
        tail = [whole] * (self.plan.full_tail - 1) + [(self.outputs, self.length)]
        first = (keep, keep if self.per_layer else self.length)
        dropping = [(keep, keep)] * (middle - 1) + tail
        paths = {
            Phase.FULL: [whole] * middle + tail,
            Phase.DROP: [first] + dropping,
            # The full path's first middle layer serves the dropping path too.
            Phase.ALIGN: [whole] * middle + tail + dropping if self.align_full else [first] + dropping,
        }
        return [whole] * self.plan.first_dropped + paths[phase]

    def heads(self, phase: Phase) -> int:
        """How many paths end in the head, each with M positions a row."""
        return 2 if phase is Phase.ALIGN and self.align_full else 1

    def attention(self, phase: Phase, keep: int) -> float:
        """The part of `row` that attention's two products take."""
        return 3.0 * sum(self._scores(*layer) for layer in self.layers(phase, keep))

    def _again(self, phase: Phase, keep: int) -> float:
        """What a recomputed forward costs. It ends where all that the backward needs is there: without dropout, the
        last product of a modernbert's layers feeds nothing that is."""
        last = 2.0 * self.shape.hidden_size * self.shape.intermediate_size
        unused = sum(queries for queries, _ in self.layers(phase, keep)) * last
        spared = self.shape.is_modern and not self.shape.dropout
        return self._encoder(phase, keep) - (unused if spared else 0.0)

    def _encoder(self, phase: Phase, keep: int) -> float:
        width, inner = self.shape.hidden_size, self.shape.intermediate_size
        matrices = 3 if self.shape.is_modern else 2  # of the feed-forward: the gate has its own
        return sum(
            4 * (queries + context) * width**2 + self._scores(queries, context) + 2 * matrices * queries * width * inner
            for queries, context in self.layers(phase, keep)
        )

    def _scores(self, queries: int, context: int) -> float:
        return 4.0 * queries * context * self.shape.hidden_size

    def _head(self) -> float:
        return 2.0 * self.targets * self.shape.hidden_size * (self.shape.hidden_size + self.shape.vocab_size)


def step_flops(config: Config, shape: BertShape, length: int, share: float | None = None) -> StepFlops:
    """The count for rows of `length` tokens under this configuration.

    Args:
        share: of the tokens that are predicted; None: as the run begins.
    """
    arm = ARMS[config.arm]
    targets = target_count(config.data.mask_probability if share is None else share, length)
    return StepFlops(
        shape,
        arm.layer_plan(config.model),
        length,
        targets,
        outputs=length if config.objective.semantic_positions == "all" else 1 + targets,
        align_full=arm.needs_full_path(config.objective),
        per_layer=arm.keep_by is KeepBy.RANDOM_PER_LAYER,
        recompute=config.train.checkpoint_activations,
    )


@dataclass(frozen=True)
class _Segment:
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
        earlier: settings of the first steps, where they were others.
    """

    def __init__(
        self, config: Config, shape: BertShape, lengths: Sequence[int], earlier: Sequence[tuple[int, Config]] = ()
    ) -> None:
        self._hook, self._rows = build_hook(config, lengths[0]), config.train.batch_size
        self._steps = config.train.steps
        self._length = Schedule((1, lengths[-1]), (config.data.warmup_steps + 1, lengths[0]))
        shares = mask_share(config)
        starts = sorted({*self._length.starts, *shares.starts})
        counts = [(start, step_flops(config, shape, self._length(start), shares(start))) for start in starts]
        self._counts: Schedule[StepFlops] = Schedule(*counts)
        self.set_earlier(earlier)

    def set_earlier(self, earlier: Sequence[tuple[int, Config]]) -> None:
        """The settings of the first steps, by their last step."""
        self._earlier = [(last, _settled(each)) for last, each in earlier]

    def step(self, number: int) -> tuple[float, float]:
        """Model FLOPs of an optimizer step, and FLOPs that are executed, forward and backward."""
        phase, keep = self._hook.phase(number), self._hook.keep(number, self._length(number))
        count = self._counts(number)
        return self._rows * count.row(phase, keep), self._rows * count.hardware_row(phase, keep)

    def until(self, number: int) -> float:
        """Model FLOPs of the first steps."""
        total, done = 0.0, 0
        for last, work in [*self._earlier, (number, self)]:
            total += work._alone(min(last, number)) - work._alone(done)
            done = min(last, number)
        return total

    def _alone(self, number: int) -> float:
        """Of the first steps, if they had all been with these settings."""
        return sum(segment.until(number) for segment in self._segments)

    def seconds_left(self, record: dict[str, Any], goal: int) -> float:
        """From a record of the metrics to step `goal`, at the record's FLOPs a second."""
        return (self.until(goal) - self.until(record["step"])) / float(record["flops_per_s"])

    @cached_property
    def _segments(self) -> list[_Segment]:
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
                found.append(_Segment(first, same, *costs, interval))
                first = same + 1
        return found


def _settled(config: Config) -> Work:
    """Of a configuration with its vocabulary and its lengths in it."""
    data = config.data
    lengths = (data.seq_len, data.warmup_seq_len) if data.warmup_seq_len else (data.seq_len,)
    return Work(config, shape_of(config, config.model.vocab_size), lengths)


def flops_until(
    config: Config, manifest: Manifest, steps: Sequence[int], earlier: Sequence[tuple[int, Config]] = ()
) -> list[float]:
    """Model FLOPs, forward and backward, of a run's first steps, for each number of them.

    Args:
        earlier: settings of the first steps, where they were others.
    """
    work = Work(config, bert_shape(config, manifest), row_lengths(config, manifest), earlier)
    return [work.until(step) for step in steps]


def saving(cost: float | None, whole: float | None) -> float | None:
    """Share of the baseline's cost (its FLOPs or hours) that a run saves, negative where it costs more; None where one
    of them is not known."""
    return 1 - cost / whole if cost is not None and whole else None

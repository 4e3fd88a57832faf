"""What one training run is made of, and what each optimizer step sets anew: all of it a function of the step."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from tokenizers import Tokenizer

from sctd.config import Config
from sctd.data.draws import STREAM_DROPOUT, hash64
from sctd.data.masking import Masker
from sctd.data.stream import Rows, TrainStream
from sctd.objective.build import measuring_steps
from sctd.objective.importance import ImportanceTable
from sctd.objective.schedule import HybridScheduleHook
from sctd.schedule import Schedule
from sctd.signals import Mailbox
from sctd.train.engine.distributed import World
from sctd.train.engine.engine import StepWatch
from sctd.train.flops import Work
from sctd.train.keep.checkpoint import Progress
from sctd.train.loop.evaluation import Evaluation


@dataclass
class Run:
    """Everything that one training run is made of."""

    config: Config
    run_dir: Path
    world: World
    engine: DeepSpeedEngine
    hook: HybridScheduleHook
    importance: ImportanceTable | None
    stream: TrainStream
    valid_rows: Rows
    masker: Masker
    tokenizer: Tokenizer
    work: Work
    peak_flops: float | None
    identity: dict[str, Any]
    mailbox: Mailbox
    watch: StepWatch
    unigram_entropy: float  # of the corpus, in nats
    rate: Schedule[float] | None  # the learning rate; None where the user's DeepSpeed JSON brings a scheduler
    evaluation: Evaluation | None  # None: the weights are evaluated when the run has ended, if at all

    @property
    def last_step(self) -> int:
        return self.config.train.stop_at or self.config.train.steps

    def seed_dropout(self, step: int) -> None:
        """Dropout of a step is a function of (seed, step, rank): there is no generator state to save."""
        torch.manual_seed(int(hash64(self.config.run.seed, STREAM_DROPOUT, step, self.world.rank)) >> 1)

    def set_learning_rate(self, step: int) -> float:
        """Of all parameter groups, each in proportion to its own peak; returns the rate of `optimizer.lr`."""
        groups = self.engine.optimizer.param_groups
        if self.rate is None:
            return float(groups[0]["lr"])
        rate, peak = self.rate(step), self.config.optimizer.lr
        for group in groups:
            group["lr"] = rate * (group.get("peak_lr", peak) / peak)
        return rate

    def renew_masks(self, step: int, begins: bool = False) -> None:
        """Where masks are drawn by importance: behind a step at which that is due, draw them by the scores of now.

        Batches are prepared while earlier ones train, so masks go by a snapshot of the table; it is in checkpoints.

        Args:
            begins: whether training begins or goes on behind this step.
        """
        due = self.masker.awaits(step + 1)
        if due or (begins and self.masker.by_importance):
            assert self.importance is not None and self.importance.snapshot_V is not None
            if due:
                self.importance.snapshot_V.copy_(self.importance.scores_V)
            self.masker.draw_by(self.importance.snapshot_V.cpu().numpy())

    def commit_importance(self, step: int, applied: bool) -> None:
        """Move the importance table by the losses of an optimizer step, which may be one that measures a new one."""
        assert self.importance is not None
        steps = measuring_steps(self.config)
        self.importance.commit(applied, step in steps)
        if step in steps[-1:]:
            self.importance.end_measuring()

    def advance(self, progress: Progress) -> tuple[int, int]:
        """Count an optimizer step: the samples that it trained on, from the first one up to the end.

        The ledger is a rolling hash of rows, begun with the corpus' own: equal ledgers, equal data in equal order.
        """
        step, first = progress.step + 1, progress.cursor
        rows = self.stream.sample_rows(first, step).astype("<i8").tobytes()
        progress.ledger = hashlib.sha256(progress.ledger.encode() + rows).hexdigest()[:16]
        progress.tokens += self.config.train.batch_size * self.stream.length(step)
        progress.step, progress.cursor = step, self.stream.samples(first)[1]
        return first, progress.cursor

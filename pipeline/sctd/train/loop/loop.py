"""The training loop, on one screen. Everything it calls is a small object with one job."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from tokenizers import Tokenizer

from sctd.config import Config
from sctd.corpus.tokenizer import special_ids
from sctd.data.hashing import STREAM_DROPOUT, hash64
from sctd.data.masking import Masker
from sctd.data.stream import Batch, Rows, TrainStream
from sctd.errors import UserError
from sctd.objective.flops import Work
from sctd.objective.importance import ImportanceTable
from sctd.objective.schedule import HybridScheduleHook, Phase
from sctd.schedule import Schedule
from sctd.train.engine.distributed import World, from_main, together
from sctd.train.engine.engine import StepWatch
from sctd.train.keep import checkpoint
from sctd.train.keep.checkpoint import Progress, Saver
from sctd.train.keep.metrics import read_metrics
from sctd.train.keep.preemption import Mailbox, Requests
from sctd.train.loop.alignment import kl_gradient
from sctd.train.loop.evaluation import Evaluation
from sctd.train.loop.guards import Curve, GoBack, Pace, Plateau, Skips, levers, spread
from sctd.train.loop.monitor import Clock, LossMeter, Monitor
from sctd.train.loop.validation import validate

_ROLLBACKS = 3


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


def train(run: Run, progress: Progress) -> Progress:
    """Train from `progress` to `train.stop_at`, or until asked to stop, logging, validating and saving on the way.

    Where `train.rollback_after` steps in a row had gradients that are not finite, training goes back to the newest
    checkpoint and passes over the samples of those steps.
    """
    cfg = run.config.train
    requests = Requests(run.mailbox, run.run_dir, run.world, cfg.timeout)
    saver = Saver(run.engine, run.run_dir, run.identity, run.world, cfg.keep_checkpoints, cfg.async_save, cfg.timeout)
    since, rollbacks = -1, 0  # the checkpoint gone back to last, and how often it was
    while rollbacks < _ROLLBACKS:
        goal = cfg.stop_at or cfg.steps
        left = partial(run.work.seconds_left, goal=goal)
        monitor = Monitor(run.run_dir, run.world, progress.step, goal, left)
        run.stream.passed_over = (*run.config.data.skip_samples, *progress.passed_over)
        batches = run.stream.iterate(progress.cursor, progress.step + 1)
        try:
            return _train(run, progress, batches, monitor, requests, saver)
        except GoBack as wrong:
            saver.wait()
            progress = _go_back(run, wrong, monitor)
            rollbacks = rollbacks + 1 if progress.step == since else 1
            since = progress.step
        finally:
            batches.close()
            monitor.close()
    raise UserError(
        f"went back {_ROLLBACKS} times to step {since} for gradients that were not finite: lower optimizer.lr"
    )


def _train(
    run: Run,
    progress: Progress,
    batches: Iterator[list[Batch]],
    monitor: Monitor,
    requests: Requests,
    saver: Saver,
) -> Progress:
    cfg = run.config.train
    last_step = cfg.stop_at or cfg.steps
    meter, clock, skips = LossMeter(run.world.device), Clock(progress.seconds), Skips(cfg.rollback_after, cfg.precision)
    window, curve = Window(run, progress), Curve(progress.cursor)
    warmup, before = run.config.schedule.warmup_steps, read_metrics(run.run_dir) if run.world.is_main else []
    plateau = Plateau(run.unigram_entropy, warmup, before, levers(run.config))
    run.engine.train()

    for step in range(progress.step + 1, last_step + 1):
        seed_dropout(run.config.run.seed, step, run.world.rank)
        rate = set_learning_rate(run, step)
        for batch in window.wait_for(batches):
            on_device = {name: tensor.to(run.world.device, non_blocking=True) for name, tensor in batch.items()}
            with window.pace.forward():
                loss, parts = run.engine(**on_device)
            run.engine.backward(loss)
            run.engine.step()
            meter.add(parts)
        applied, first = run.watch.applied(), progress.cursor
        if run.importance is not None:
            run.importance.commit(applied)
        progress.ledger = extend_ledger(progress.ledger, run.stream, progress.cursor, step)
        progress.tokens += cfg.batch_size * run.stream.length(step)
        progress.step, progress.cursor = step, run.stream.samples(progress.cursor)[1]
        if not applied:
            monitor.say(f"step {step} skipped, its gradients are not finite: samples {first} to {progress.cursor}")
        skips.add(applied, first, progress.cursor)
        window.add(step)
        monitor.advance(step)
        requests.agree(saver.failed)
        if requests.failed:
            saver.wait()  # raises what went wrong, on all ranks

        validates = step == last_step or is_due(step, cfg.valid_every)
        evaluates = is_due(step, run.config.evaluation.every)
        if validates or evaluates or requests.stop or step == 1 or is_due(step, cfg.log_every):
            means = meter.read(run.watch.grad_norm())
            progress.seconds = clock.seconds()
            record = {"step": step, "phase": str(run.hook.phase(step)), **means, "lr": rate}
            record |= window.read(progress, requests.gather)
            with clock.paused():
                if run.hook.phase(step) is Phase.ALIGN:
                    keep = run.hook.keep(step, run.stream.length(step))
                    record["kl_gradient"] = kl_gradient(run.engine.module, on_device, keep)
                if validates:
                    record |= _validate(run, requests)
                    monitor.importance(run.importance, run.tokenizer, step)
                if evaluates and run.evaluation is not None and not requests.stop:
                    record |= run.evaluation(requests, monitor.say)
                warnings = [*curve.look(record), *(plateau.look(record) if record.get("valid_loss") else ())]
                monitor.log(record)
                for warning in warnings:
                    monitor.say(warning)
        if step == last_step or requests.stop or requests.save or is_due(step, cfg.save_every):
            progress.seconds = clock.seconds()
            requests.save = False
            with clock.paused():
                saver.save(progress, None if run.importance is None else run.importance.scores_V)
        if requests.stop:
            break
    requests.close()
    saver.wait()
    return progress


def _go_back(run: Run, wrong: GoBack, monitor: Monitor) -> Progress:
    path = from_main(run.world, lambda: checkpoint.newest_whole(run.run_dir))
    if path is None:
        raise UserError(
            f"{run.config.train.rollback_after} steps in a row had gradients that are not finite ({wrong}), and there "
            "is no checkpoint to go back to: lower optimizer.lr, or save earlier with train.save_every"
        )
    progress = restore(run, path)
    progress.passed_over.append(wrong.span)
    monitor.say(f"going back to step {progress.step} ({path.name}), and passing over {wrong}")
    return progress


def restore(run: Run, path: Path) -> Progress:
    """Put a verified checkpoint into the engine and the importance table.

    Raises:
        RunError: on all ranks, for what keeps any of them from reading it.
    """
    progress, scores = together(run.world, lambda: checkpoint.load(run.engine, path))
    if run.importance is not None and scores is not None:
        run.importance.restore(scores)
    run.watch.look()
    return progress


def _validate(run: Run, requests: Requests) -> dict[str, float]:
    def stop() -> bool:
        requests.agree()
        return requests.stop

    rows, micro_batch = run.config.train.valid_rows, run.stream.share.micro_batch
    return validate(run.engine, run.valid_rows, run.masker, rows, micro_batch, run.world, stop)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


class Window:
    """Work since the last log record. What it counts, it counts on the host: nothing waits for the device."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run = run
        self._pad = special_ids(run.tokenizer).pad
        self._start(progress)

        self.pace = Pace(run.world.device)

    def _start(self, progress: Progress) -> None:
        self._step, self._seconds, self._tokens = progress.step, progress.seconds, progress.tokens
        self._flops = self._hardware_flops = self._waited = 0.0
        self._padded = self._positions = 0

    def wait_for(self, batches: Iterator[list[Batch]]) -> list[Batch]:
        """The next step's batches, with the time that they kept the loop waiting, and their padding, on record."""
        asked = time.perf_counter()
        step = next(batches)
        self._waited += time.perf_counter() - asked
        for batch in step:
            self._positions += batch["input_ids"].numel()
            self._padded += int(batch["input_ids"].eq(self._pad).sum())
        return step

    def add(self, step: int) -> None:
        model, hardware = self._run.work.step(step)
        self._flops += model
        self._hardware_flops += hardware

    def read(self, progress: Progress, gather: Callable[[float], list[float]]) -> dict[str, Any]:
        """The metrics that need a stretch of time, and the counters; starts a new window.

        `padding` and `data_wait` are those of this rank. `gather`: a number of each rank, on every rank.
        """
        run = self._run
        steps, seconds = progress.step - self._step, progress.seconds - self._seconds
        length = run.stream.length(progress.step)
        peak = run.peak_flops and run.peak_flops * run.world.size
        record = {
            "samples": progress.cursor,
            "tokens": progress.tokens,
            "tokens_per_s": (progress.tokens - self._tokens) / seconds,
            "flops": run.work.until(progress.step),
            "flops_per_s": self._flops / seconds,
            "mfu": self._flops / seconds / peak if peak else None,
            "hfu": self._hardware_flops / seconds / peak if peak else None,
            "padding": self._padded / self._positions,
            "data_wait": self._waited / seconds,
            "seconds": progress.seconds,
            "step_seconds": seconds / steps,
            "skipped_steps": run.engine.skipped_steps,
            "keep": length if run.hook.phase(progress.step) is Phase.FULL else run.hook.keep(progress.step, length),
            "ledger": progress.ledger,
            **spread(gather(self.pace.read())),
        }
        self._start(progress)
        return record


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout of a step is a function of (seed, step, rank): there is no generator state to save."""
    torch.manual_seed(int(hash64(seed, STREAM_DROPOUT, step, rank)) >> 1)


def set_learning_rate(run: Run, step: int) -> float:
    """Of all parameter groups, each in proportion to its own peak; the rate of `optimizer.lr`."""
    groups = run.engine.optimizer.param_groups
    if run.rate is None:
        return float(groups[0]["lr"])
    rate, peak = run.rate(step), run.config.optimizer.lr
    for group in groups:
        group["lr"] = rate * (group.get("peak_lr", peak) / peak)
    return rate


def extend_ledger(ledger: str, stream: TrainStream, cursor: int, step: int) -> str:
    """Rolling hash of the rows trained on, begun with the corpus' own: equal ledgers, equal data in equal order."""
    rows = stream.sample_rows(cursor, step)
    return hashlib.sha256(ledger.encode() + rows.astype("<i8").tobytes()).hexdigest()[:16]

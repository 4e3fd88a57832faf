"""What happens between two log records of a training, and the record of it."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sctd.corpus.tokenizer import special_ids
from sctd.data.stream import Batch
from sctd.objective.schedule import Phase
from sctd.train.keep.checkpoint import Progress
from sctd.train.keep.metrics import read_metrics
from sctd.train.keep.preemption import Requests
from sctd.train.loop.alignment import kl_gradient
from sctd.train.loop.guards import Curve, Pace, Plateau, levers, spread
from sctd.train.loop.monitor import Clock, LossMeter, Monitor
from sctd.train.loop.run import Run
from sctd.train.loop.validation import held_out


class Window:
    """Work since the last log record. What it counts, it counts on the host: nothing waits for the device."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run = run
        self._pad = special_ids(run.tokenizer).pad
        self.pace = Pace(run.world.device)
        self._start(progress)

    def _start(self, progress: Progress) -> None:
        self._step, self._seconds, self._tokens = progress.step, progress.seconds, progress.tokens
        self._flops = self._hardware_flops = self._waited = 0.0
        self._padded = self._positions = 0

    def wait_for(self, batches: Iterator[list[Batch]]) -> list[Batch]:
        """The next step's batches; how long the loop waited for them and their padding are counted."""
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


class Recorder:
    """Measures a training from `progress` on, and writes its records."""

    def __init__(self, run: Run, progress: Progress, requests: Requests) -> None:
        self._run, self._progress, self._requests = run, progress, requests
        left = partial(run.work.seconds_left, goal=run.last_step)
        self.monitor = Monitor(run.run_dir, run.world, progress.step, run.last_step, left)
        self.clock, self.meter = Clock(progress.seconds), LossMeter(run.world.device)
        self.window = Window(run, progress)
        before = read_metrics(run.run_dir) if run.world.is_main else []
        self._curve = Curve(progress.cursor)
        self._plateau = Plateau(run.unigram_entropy, run.config.schedule.warmup_steps, before, levers(run.config))

    def first(self) -> None:
        """The record of step 0, by all ranks: what the model that training starts from is worth on held-out rows."""
        with self.clock.paused():
            found = self._held_out()
        if not found:  # stopped meanwhile
            return
        counts = dict.fromkeys(("step", "samples", "tokens"), 0) | dict.fromkeys(("flops", "seconds"), 0.0)
        record: dict[str, Any] = {**counts, "phase": "full", **found}
        list(self._plateau.look(record))
        self.monitor.write(record)
        gap = record["valid_gap"]
        self.monitor.say(
            f"held-out  loss {record['valid_loss']:.4f} before the first step, {abs(gap):.2f} nats "
            f"{'below' if gap > 0 else 'ABOVE'} the unigram entropy; masked accuracy {record['valid_accuracy']:.1%}"
        )

    def write(self, rate: float, batch: Batch, validates: bool, evaluates: bool) -> None:
        """The record of the step that was just taken, by all ranks.

        Args:
            batch: its last micro-batch, on the device.
        """
        run, progress, requests = self._run, self._progress, self._requests
        step, phase = progress.step, run.hook.phase(progress.step)
        record = {"step": step, "phase": str(phase), **self.meter.read(run.watch.grad_norm()), "lr": rate}
        progress.seconds = self.clock.seconds()
        record |= self.window.read(progress, requests.gather)
        with self.clock.paused():
            if phase is Phase.ALIGN:
                keep = run.hook.keep(step, run.stream.length(step))
                record["kl_gradient"] = kl_gradient(run.engine.module, batch, keep)
            if validates:
                record |= self._held_out()
                self.monitor.importance(run.importance, run.tokenizer, step)
            if evaluates and run.evaluation is not None and not requests.stop:
                record |= run.evaluation(requests, self.monitor.say)
            warnings = [*self._curve.look(record), *(self._plateau.look(record) if "valid_loss" in record else ())]
            self.monitor.log(record)
            for warning in warnings:
                self.monitor.say(warning)

    def _held_out(self) -> dict[str, float]:
        run = self._run
        limit, at_once = run.config.train.valid_rows, run.stream.share.micro_batch
        return held_out(run.engine, run.valid_rows, run.masker, limit, at_once, run.world, self._stops)

    def _stops(self) -> bool:
        self._requests.agree()
        return self._requests.stop

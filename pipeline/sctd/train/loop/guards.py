"""Guards of a run's numbers: skipped steps, losses that jump or do not fall, slow ranks."""

import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sctd.config import Config

_MEMORY = 20  # log records that a loss is held against
_JUMP = 1.0  # nats above their median, and
_SPREADS = 5.0  # so many times their usual distance from it, make a spike
_BREAKTHROUGH = 1.0  # nats below the unigram entropy: what no model reaches that leaves the context unused
_FLAT = 3  # validations past the warm-up that must have brought less than
_RISE = 0.1  # nats for a run to sit on the plateau
_SCALER_STEPS = 16  # steps in a row that an fp16 scaler may skip until it has found its scale


class GoBack(Exception):
    """Too many steps in a row were skipped; their samples are those from `first` up to `end`."""

    def __init__(self, first: int, end: int) -> None:
        super().__init__(f"samples {first} to {end}")
        self.span = (first, end)


class Skips:
    """Counts optimizer steps that were not applied, in a row.

    Args:
        most: of them in a row, then it raises; 0: never.
    """

    def __init__(self, most: int, precision: str) -> None:
        self._most = most + _SCALER_STEPS if precision == "fp16" and most else most
        self._row = 0
        self._first = 0

    def add(self, applied: bool, first: int, end: int) -> None:
        """After each step, with its samples.

        Raises:
            GoBack: it was one too many.
        """
        self._first = first if self._row == 0 else self._first
        self._row = 0 if applied else self._row + 1
        if self._most and self._row == self._most:
            raise GoBack(self._first, end)


class Curve:
    """Warns of spikes in the logged MLM losses.

    Args:
        cursor: samples consumed before the first record.
    """

    def __init__(self, cursor: int) -> None:
        self._losses: deque[float] = deque(maxlen=_MEMORY)
        self._cursor = cursor

    def look(self, record: dict[str, Any]) -> Iterator[str]:
        """The warnings for a log record."""
        loss = record["mlm_full"] if record["mlm_drop"] is None else record["mlm_drop"]
        before, self._cursor = self._cursor, record["samples"]
        if loss is None:
            return
        if len(self._losses) >= _MEMORY // 2:
            middle = statistics.median(self._losses)
            usual = statistics.median(abs(one - middle) for one in self._losses)
            if loss > middle + max(_JUMP, _SPREADS * usual):
                yield (
                    f"WARNING: loss spike at step {record['step']}: {loss:.3f} after {middle:.3f}; "
                    f"to pass over its samples, branch from an earlier checkpoint with "
                    f"data.skip_samples=[[{before},{self._cursor}]]"
                )
        self._losses.append(loss)


class Plateau:
    """Watches a model leave the plateau on which it knows how frequent tokens are and little more.

    Args:
        entropy: of the corpus' unigrams in nats: the loss of a model that knows frequencies alone.
        warmup: steps after which it should know more.
        records: of the run so far.
        levers: what to try, for the warning.
    """

    def __init__(self, entropy: float, warmup: int, records: Iterable[dict[str, Any]], levers: str) -> None:
        self._entropy, self._warmup, self._levers = entropy, warmup, levers
        self._breakthrough: int | None = None
        self._late: list[float] = []  # gaps past the warm-up
        self._warned = False
        for record in records:
            if record.get("valid_loss") is not None:
                self._warned |= self._stuck(record)

    def look(self, record: dict[str, Any]) -> Iterator[str]:
        """Adds to a record with a validation `valid_gap`, nats below the entropy, and `breakthrough_step`, that of the
        first validation at least 1 nat below it (null: not yet); yields a warning where the run sits on the plateau,
        once."""
        stuck, gap = self._stuck(record), self._gap(record)
        record |= {"valid_gap": gap, "breakthrough_step": self._breakthrough}
        if stuck and not self._warned:
            self._warned = True
            yield (
                f"WARNING: on the plateau: {_FLAT} validations brought less than {_RISE:g} nats, the last one is "
                f"{abs(gap):.2f} nats {'below' if gap > 0 else 'above'} the unigram entropy of {self._entropy:.3f} "
                f"(context use {record['context_use']:.2f}); what leaves it: {self._levers}"
            )

    def _gap(self, record: dict[str, Any]) -> float:
        return self._entropy - float(record["valid_loss"])

    def _stuck(self, record: dict[str, Any]) -> bool:
        """Whether the last validations past the warm-up, this one included, show no way off the plateau."""
        gap = self._gap(record)
        if self._breakthrough is None and gap >= _BREAKTHROUGH:
            self._breakthrough = record["step"]
        if record["step"] > self._warmup:
            self._late.append(gap)
        recent = self._late[-_FLAT:]
        flat = len(recent) == _FLAT and abs(recent[-1] - recent[0]) < _RISE
        return self._breakthrough is None and flat


def levers(config: Config) -> str:
    """What a run has not tried that leaves the plateau, best first (docs/learning.md has the measurements)."""
    begins = not config.init.from_ and not config.run.branch_from
    known = [
        ("model.family=modernbert", begins and config.model.family != "modernbert"),
        ("optimizer.name=muon", config.optimizer.name != "muon" and config.train.zero_stage < 3),
        ("model.positions=sinusoidal",
         begins and config.model.family == "bert" and config.model.positions == "learned"),
        ("schedule.full_start (steps before the first dropping one)",
         config.arm != "baseline" and not config.schedule.full_start),
        ("a higher optimizer.lr, or more steps", True),
    ]  # fmt: skip
    return ", ".join(name for name, helps in known if helps)


class Pace:
    """Seconds that this rank has spent in forwards, which do not wait for other ranks; backwards and steps do."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = [] if device.type == "cuda" else None
        self._seconds = 0.0

    @contextmanager
    def forward(self) -> Iterator[None]:
        if self._events is None:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
        else:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)

    def read(self) -> float:
        """Since the last call; on GPUs to be called when the device was waited for."""
        seconds, self._seconds = self._seconds, 0.0
        if self._events is not None:
            seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000.0
            self._events.clear()
        return seconds


def spread(seconds: list[float]) -> dict[str, Any]:
    """How much longer than the middle one the slowest rank takes (1: not at all), and which it is."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    middle = statistics.median(seconds)
    return {"rank_spread": seconds[slowest] / middle if middle else 1.0, "slowest_rank": slowest}

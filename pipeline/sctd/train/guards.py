"""What watches over the numbers of a run: steps that had to be skipped, losses that jump or do not move, slow ranks."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MEMORY = 20  # log records that a loss is held against
_JUMP = 1.0  # nats above their median, and
_SPREADS = 5.0  # so many times their usual distance from it, make a spike
_NEAR = 0.1  # nats around the unigram entropy that count as sitting on it
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
    """Says what is strange about the logged MLM losses, in a line.

    Args:
        entropy: of the corpus' unigrams in nats: the loss of a model that knows how frequent tokens are, and no more.
        warmup: steps after which it should know more.
        cursor: samples consumed before the first record.
    """

    def __init__(self, entropy: float, warmup: int, cursor: int) -> None:
        self._entropy, self._warmup = entropy, warmup
        self._losses: deque[float] = deque(maxlen=_MEMORY)
        self._cursor, self._told = cursor, False

    def look(self, record: dict[str, Any]) -> Iterator[str]:
        """The warnings that a log record gives cause for."""
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
                    f"to pass over its samples, resume an earlier checkpoint with "
                    f"data.skip_samples=[[{before},{self._cursor}]]"
                )
        self._losses.append(loss)
        stuck = len(self._losses) == _MEMORY and all(abs(one - self._entropy) < _NEAR for one in self._losses)
        if stuck and record["step"] > self._warmup and not self._told:
            self._told = True
            yield (
                f"WARNING: the MLM loss sits on the corpus' unigram entropy of {self._entropy:.3f} nats: the model "
                "knows how frequent tokens are, and no more; look at optimizer.lr and at the warm-up"
            )


class Pace:
    """Seconds that this rank has spent in forwards, which wait for no other rank, as backwards and steps do."""

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

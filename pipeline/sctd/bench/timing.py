"""Timing that means something: candidates take turns, the device is waited for, medians are reported.

A `Comparison` is one piece of work and everyone who can do it.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COPY = "copy of the same bytes"
OURS = "sctd, "  # and the backend
Call = Callable[[], Any]


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def medians(candidates: Mapping[str, Call], rounds: int, repeat: int = 1, progress: str = "") -> dict[str, float]:
    """Median seconds of one call of each candidate over `rounds` rounds after a first one that warms up.

    Args:
        repeat: calls between two readings of the clock, for calls too short to be timed alone.
        progress: what is printed after each round, before its number.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, call in candidates.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            wait()
            if round_:
                seconds[name].append((time.perf_counter() - start) / repeat)
        if progress:
            print(f"  {progress} round {round_}/{rounds}", file=sys.stderr)
    return {name: statistics.median(times) for name, times in seconds.items()}


def kernel_seconds(call: Call, repeat: int) -> float | None:
    """Seconds that the GPU works for one call, without the gaps in which it waits for the host.

    None on a CPU, and where the profiler may not look at the GPU.
    """
    if DEVICE.type != "cuda":
        return None
    wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeat):
            call()
        wait()
    spent = sum(microseconds for _, microseconds, _ in self_times(profiler))
    return spent / 1e6 / repeat or None


def self_times(profiler: profile) -> list[tuple[str, float, int]]:
    """(name, microseconds, calls) of what was seen: kernels and copies on a GPU, operations on a CPU.

    An operation carries the time of the kernels that it launched too: to count both would count twice.
    """
    events = profiler.key_averages()
    if DEVICE.type == "cuda":
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        return [(event.key, event.self_device_time_total, event.count) for event in kernels]
    return [(event.key, event.self_cpu_time_total, event.count) for event in events]


@dataclass
class Comparison:
    """
    Args:
        candidates: by name; the copy joins them where bytes are given.
        moved: bytes that the work must read and write at least; None where it does more than move.
        seconds: of one call, as a host sees it. kernel_seconds: of one call on the GPU alone; empty on a CPU.
    """

    candidates: dict[str, Call]
    moved: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    kernel_seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, rounds: int, repeat: int, progress: str) -> None:
        """Fill in the seconds, and let go of the candidates with all their tensors."""
        if self.moved is not None:
            self.candidates[COPY] = torch.empty(self.moved // 2, dtype=torch.uint8, device=DEVICE).clone
        self.seconds = medians(self.candidates, rounds, repeat, progress)
        for name, call in self.candidates.items():
            found = kernel_seconds(call, repeat)
            if found is not None:
                self.kernel_seconds[name] = found
        self.candidates.clear()

    def compared(self) -> dict[str, float]:
        """What ratios are made of: the kernels' own time where all of it is known."""
        return self.kernel_seconds if len(self.kernel_seconds) == len(self.seconds) else self.seconds

    def best(self) -> str:
        """The fastest of ours."""
        compared = self.compared()
        return min((name for name in compared if name.startswith(OURS)), key=lambda name: compared[name])


def ours(backends: list[str], call: Call) -> dict[str, Call]:
    return {f"{OURS}{backend}": call for backend in backends}


def forward(calls: dict[str, Call]) -> dict[str, Call]:
    """Without what a backward would need."""
    return {name: _under(name, torch.no_grad()(call)) for name, call in calls.items()}


def with_backward(calls: dict[str, Call], of: Sequence[Tensor]) -> dict[str, Call]:
    """Followed by the gradients of these tensors."""
    return {name: _under(name, _differentiated(call, of)) for name, call in calls.items()}


def _differentiated(call: Call, of: Sequence[Tensor]) -> Call:
    grads: list[Tensor] = []

    def both() -> Any:
        out = call()
        outs = out if isinstance(out, tuple) else (out,)
        if not grads:
            grads.extend(torch.ones_like(each) for each in outs)
        return torch.autograd.grad(outs, of, grads)

    return both


def _under(name: str, call: Call) -> Call:
    """The backward chooses its backend too, so the choice stands around both."""
    if not name.startswith(OURS):
        return call

    def chosen() -> Any:
        before = os.environ.get("SCTD_KERNELS", "auto")
        os.environ["SCTD_KERNELS"] = name.removeprefix(OURS)
        try:
            return call()
        finally:
            os.environ["SCTD_KERNELS"] = before

    return chosen

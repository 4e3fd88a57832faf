"""Timing that means something: candidates take turns, the device is waited for, medians are reported."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def medians(
    candidates: Mapping[str, Callable[[], object]], rounds: int, repeat: int = 1, say: str = ""
) -> dict[str, float]:
    """Median seconds of one call of each candidate over `rounds` rounds after a first one that warms up.

    Args:
        repeat: calls between two readings of the clock, for calls too short to be read alone.
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
        if say:
            print(f"  {say} round {round_}/{rounds}", file=sys.stderr)
    return {name: statistics.median(times) for name, times in seconds.items()}


def kernel_seconds(call: Callable[[], object], repeat: int) -> float | None:
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

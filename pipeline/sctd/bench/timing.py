"""Timing that means something: candidates take turns, the device is waited for, medians are reported."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

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

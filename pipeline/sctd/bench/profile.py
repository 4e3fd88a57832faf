"""One DROP and one ALIGN step under torch's profiler: a trace for Perfetto, and the ten dearest operations."""

from pathlib import Path as File

import torch
from torch.profiler import ProfilerActivity, profile

from sctd.bench.paths import Path
from sctd.bench.timing import DEVICE, wait
from sctd.config import Config

_DEAREST = 10


def profile_steps(config: Config, rows: int, length: int, out: File) -> None:
    """Write `trace-drop.json.gz` and `trace-align.json.gz` into `out`, for https://ui.perfetto.dev."""
    out.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    for name in ("drop", "align"):
        path = Path(name, config, rows, length)
        for _ in range(2):  # warms up
            path.step()
        wait()
        with profile(activities=activities) as profiler:
            path.step()
            wait()
        trace = out / f"trace-{name}.json.gz"
        profiler.export_chrome_trace(str(trace))
        print(f"{name.upper()} step, {rows}x{length}, {DEVICE.type}, {config.train.precision}: {trace}")
        for line in _dearest(profiler):
            print(f"  {line}")
        del path


def _dearest(profiler: torch.profiler.profile) -> list[str]:
    """Operations by the time that they themselves take on the device, largest first."""
    events = profiler.key_averages()
    key = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    total = sum(getattr(event, key) for event in events)
    events = sorted(events, key=lambda event: -getattr(event, key))[:_DEAREST]
    return [
        f"{getattr(event, key) / total:6.1%} {getattr(event, key) / 1e3:10.1f} ms {event.count:6d} x  {event.key}"
        for event in events
    ]

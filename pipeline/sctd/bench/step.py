"""Forward and training step of every arm against the same model in transformers and DeepSpeed's random-LTD."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sctd.bench.contenders import LTD, Contender, random_ltd_missing
from sctd.bench.result import write_result
from sctd.bench.timing import DEVICE, medians, wait
from sctd.config import Config, config_from_dict, to_dict
from sctd.errors import UserError
from sctd.present.table import Table, as_markdown
from sctd.train.engine.devices import DTYPES, device_name, device_peak, keep_freed_memory

_NAMES = {  # in the order of the table
    "transformers": "transformers",
    "full": "baseline (full)",
    "drop": "token drop",
    "align": "SCTD's ALIGN step",
    "sctd": "SCTD, mean step",
    "random_ltd": "random-LTD, ours",
    LTD: "random-LTD, DeepSpeed's ops",
}
Row = dict[str, float]


def bench_steps(
    config: Config, recipe: str, sizes: list[tuple[int, int]], rounds: int, out: Path, names: list[str]
) -> None:
    """Print the table and write `bench-LAYERSxWIDTH-PRECISION-<device>.json` into `out`."""
    missing = random_ltd_missing(config.model.family) if LTD in names else None
    names = [name for name in names if name != LTD or missing is None]
    peak = device_peak(DEVICE, DTYPES[config.train.precision])
    results = {f"{rows}x{length}": measure(config, names, rows, length, rounds, peak) for rows, length in sizes}
    print(title(config, recipe, rounds, peak))
    print(as_markdown(table(results)))
    if missing:
        print(f"{_NAMES[LTD]} is not in the table: {missing}")
    family = "" if config.model.family == "bert" else f"{config.model.family}-"
    size = f"{family}{config.model.layers}x{config.model.hidden_size}"
    compiled = "-compiled" if config.train.compile else ""
    result = {
        "recipe": recipe, "precision": config.train.precision, "compiled": config.train.compile,
        "interval": config.objective.interval, "rounds": rounds, "peak_flops": peak, "config": to_dict(config),
        "missing": {LTD: missing} if missing else {}, "sizes": results,
    }  # fmt: skip
    print(f"written {write_result(out, f'bench-{size}-{config.train.precision}{compiled}', result)}")


def measure(
    config: Config, names: list[str], rows: int, length: int, rounds: int, peak: float | None
) -> dict[str, Row]:
    """Seconds of a forward and of a step, share of the device's peak and peak memory (MiB), for each contender."""
    memory = {name: _peak_memory(name, config, rows, length) for name in names}
    contenders = {name: Contender(name, config, rows, length) for name in names}
    size = f"{rows}x{length}"
    steps = medians({name: each.step for name, each in contenders.items()}, rounds, progress=f"{size} step")
    forwards = medians({name: each.forward for name, each in contenders.items()}, rounds, progress=f"{size} forward")
    found: dict[str, Row] = {}
    for name, each in contenders.items():
        found[name] = {"forward": forwards[name], "step": steps[name], "flops": each.flops, "peak_mib": memory[name]}
    if {"drop", "align"} <= found.keys():
        found["sctd"] = _mean_step(found["drop"], found["align"], config.objective.interval)
    for row in found.values():
        row["rows_per_s"] = rows / row["step"]
        if peak:
            row["mfu"] = row["flops"] / row["step"] / peak
    return found


def _mean_step(drop: Row, align: Row, interval: int) -> Row:
    """Of `interval` steps the last aligns."""
    mean = {key: ((interval - 1) * drop[key] + align[key]) / interval for key in ("forward", "step", "flops")}
    return mean | {"peak_mib": max(drop["peak_mib"], align["peak_mib"])}


def title(config: Config, recipe: str, rounds: int, peak: float | None) -> str:
    """What stands over the table: all that its numbers hold for."""
    of = f"MFU of {peak / 1e12:,.2f} TFLOP/s" if peak else "no MFU: the peak of this device is not known"
    how = "both sides compiled" if config.train.compile else "nothing compiled"
    model, precision = config.model, config.train.precision
    return (
        f"{recipe}: {model.family}, {model.layers} layers of {model.hidden_size}, {precision}, {how}; {device_name()}; "
        f"steps of AdamW, medians of {rounds}; {of}"
    )


def table(results: dict[str, dict[str, Row]]) -> Table:
    """Ratios: how often as fast as transformers, and how much of the full step's time."""
    times = ("x transformers", "/ full")
    head = ("rows x length", "path", "forward ms", *times, "step ms", *times, "rows/s", "MFU", "peak MiB")
    rows = []
    for size, found in results.items():
        for name in (name for name in _NAMES if name in found):
            row, cells = found[name], [size, _NAMES[name]]
            for key in ("forward", "step"):
                seconds, them, full = row[key], found["transformers"][key], found["full"][key]
                cells += [f"{1e3 * seconds:,.1f}", f"{them / seconds:.2f}", f"{seconds / full:.3f}"]
            mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
            rows.append([*cells, f"{row['rows_per_s']:,.2f}", mfu, f"{row['peak_mib']:,.0f}"])
    return Table("steps", "", head, rows, texts=2)


def _peak_memory(name: str, config: Config, rows: int, length: int) -> float:
    """Peak MiB of two steps of one contender: of the GPU's memory, or of a process that does nothing else."""
    if DEVICE.type != "cuda":
        job = json.dumps({"name": name, "config": to_dict(config), "rows": rows, "length": length})
        done = subprocess.run([sys.executable, "-m", "sctd.bench.step", job], capture_output=True, text=True)
        if done.returncode != 0:
            said = (done.stderr.split("\n")[-2:] or [""])[0] or f"ended by signal {-done.returncode}, out of memory?"
            raise UserError(f"--sizes: {name} at {rows}x{length} cannot be run: {said}")
        return float(done.stdout.split()[-1])
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _two_steps(name, config, rows, length)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _two_steps(name: str, config: Config, rows: int, length: int) -> None:
    contender = Contender(name, config, rows, length)
    for _ in range(2):
        contender.step()
    wait()


def _print_peak_memory(job: dict[str, Any]) -> None:
    keep_freed_memory()
    _two_steps(job["name"], config_from_dict(job["config"]), job["rows"], job["length"])
    # Not ru_maxrss: a child starts with its parent's.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    print(int(found[1]) / 2**10)


if __name__ == "__main__":
    _print_peak_memory(json.loads(sys.argv[1]))

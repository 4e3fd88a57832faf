"""Forward and training step of every arm against `transformers.BertForMaskedLM` and DeepSpeed's random-LTD."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path as File
from typing import Any

import torch

from sctd.bench.paths import PATHS, Path, random_ltd_missing
from sctd.bench.result import write_result
from sctd.bench.timing import DEVICE, medians, wait
from sctd.config import Config, config_from_dict, to_dict
from sctd.train.accounting import device_peak

_NAMES = {
    "full": "baseline (full)",
    "drop": "token drop",
    "align": "SCTD's ALIGN step",
    "sctd": "SCTD, mean step",
    "random_ltd": "random-LTD, ours",
    "deepspeed_random_ltd": "random-LTD, DeepSpeed's ops",
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Row = dict[str, float]


def bench_steps(config: Config, recipe: str, sizes: list[tuple[int, int]], rounds: int, out: File) -> None:
    """Print the table and write `bench-RECIPE-PRECISION-<device>.json` into `out`."""
    missing = random_ltd_missing()
    names = [name for name in PATHS if name != "deepspeed_random_ltd" or missing is None]
    peak = device_peak(DEVICE, _DTYPES[config.train.precision])
    results = {f"{rows}x{length}": measure(config, names, rows, length, rounds, peak) for rows, length in sizes}
    print(table(results, peak))
    if missing:
        print(f"DeepSpeed's random-LTD is not in the table: {missing}")
    size = f"{config.model.layers}x{config.model.hidden_size}"
    compiled = "-compiled" if config.train.compile else ""
    result = {
        "recipe": recipe, "precision": config.train.precision, "compiled": config.train.compile,
        "interval": config.objective.interval, "rounds": rounds, "peak_flops": peak, "config": to_dict(config),
        "deepspeed_random_ltd": missing or "built", "sizes": results,
    }  # fmt: skip
    print(f"written {write_result(out, f'bench-{size}-{config.train.precision}{compiled}', result)}")


def measure(
    config: Config, names: list[str], rows: int, length: int, rounds: int, peak: float | None
) -> dict[str, Row]:
    """Seconds of a forward and of a step, share of the device's peak and peak memory (MiB), for each path."""
    memory = {name: _peak_memory(name, config, rows, length) for name in names}
    paths = {name: Path(name, config, rows, length) for name in names}
    say = f"{rows}x{length}"
    steps = medians({name: path.step for name, path in paths.items()}, rounds, say=f"{say} step")
    forwards = medians({name: path.forward for name, path in paths.items()}, rounds, say=f"{say} forward")
    found: dict[str, Row] = {}
    for name, path in paths.items():
        found[name] = {"forward": forwards[name], "step": steps[name], "flops": path.flops, "peak_mib": memory[name]}
    interval = config.objective.interval
    drop, align = found["drop"], found["align"]
    found["sctd"] = {key: ((interval - 1) * drop[key] + align[key]) / interval for key in ("forward", "step", "flops")}
    found["sctd"]["peak_mib"] = max(drop["peak_mib"], align["peak_mib"])
    for row in found.values():
        row["rows_per_s"] = rows / row["step"]
        row["mfu"] = row["flops"] / row["step"] / peak if peak else float("nan")
    return found


def table(results: dict[str, dict[str, Row]], peak: float | None) -> str:
    lines = [
        "| rows x length | path | forward ms | step ms | rows/s | x transformers | / full | MFU | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = ("transformers", "full", "drop", "align", "sctd", "random_ltd", "deepspeed_random_ltd")
    for size, found in results.items():
        for name in (name for name in order if name in found):
            row, them, full = found[name], found["transformers"]["step"], found["full"]["step"]
            mfu = f"{row['mfu']:.1%}" if peak else "-"
            lines.append(
                f"| {size} | {_NAMES.get(name, name)} | {1e3 * row['forward']:,.1f} | {1e3 * row['step']:,.1f} | "
                f"{row['rows_per_s']:,.2f} | {them / row['step']:.2f} | {row['step'] / full:.3f} | {mfu} | "
                f"{row['peak_mib']:,.0f} |"
            )
    return "\n".join(lines)


def _peak_memory(name: str, config: Config, rows: int, length: int) -> float:
    """Peak MiB of two steps of one path: of the GPU's memory, or of a process that does nothing else."""
    if DEVICE.type != "cuda":
        job = json.dumps({"name": name, "config": to_dict(config), "rows": rows, "length": length})
        command = [sys.executable, "-m", "sctd.bench.step", job]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    path = Path(name, config, rows, length)
    for _ in range(2):
        path.step()
    wait()
    peak = torch.cuda.max_memory_allocated() - before
    del path
    return peak / 2**20


def _print_peak_memory(job: dict[str, Any]) -> None:
    path = Path(job["name"], config_from_dict(job["config"]), job["rows"], job["length"])
    for _ in range(2):
        path.step()
    # Not ru_maxrss: a child starts with its parent's.
    found = re.search(r"VmHWM:\s+(\d+) kB", File("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    print(int(found[1]) / 2**10)


if __name__ == "__main__":
    _print_peak_memory(json.loads(sys.argv[1]))

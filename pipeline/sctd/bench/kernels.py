"""The kernels against what one would write without them, and against a plain copy of the same bytes."""

from pathlib import Path
from typing import Any

import torch

from sctd.bench.candidates import COPY, OURS, Group, forward, ours
from sctd.bench.elementwise import elementwise
from sctd.bench.moves import TOGETHER, moves
from sctd.bench.paths import random_ltd_missing
from sctd.bench.result import write_result
from sctd.bench.timing import DEVICE
from sctd.config import Config
from sctd_kernels import select

Results = dict[str, dict[str, Group]]  # by size, by work


def bench_kernels(config: Config, sizes: list[tuple[int, int]], rounds: int, out: Path) -> None:
    """Print the table and write `kernels-PRECISION-<device>.json` into `out`."""
    backends, missing = _backends()
    ltd_missing = random_ltd_missing()
    if ltd_missing:
        missing["DeepSpeed random-LTD"] = ltd_missing
    repeat = 20 if DEVICE.type == "cuda" else 3
    results: Results = {}
    for rows, length in sizes:
        groups = moves(config, rows, length, backends, ltd_missing is None)
        groups |= elementwise(config, rows, length, [name for name in backends if name != "cuda"])
        for title, group in groups.items():
            group.measure(rounds, repeat, f"{rows}x{length} {title}")
        results[f"{rows}x{length}"] = groups
    print(table(results))
    for who, why in missing.items():
        print(f"{who} is not in the table: {why}")
    result: dict[str, Any] = {"precision": config.train.precision, "rounds": rounds, "missing": missing}
    for key in ("seconds", "kernel_seconds", "moved"):
        result[key] = {size: {title: getattr(by[title], key) for title in by} for size, by in results.items()}
    print(f"written {write_result(out, f'kernels-{config.train.precision}', result)}")


def table(results: Results) -> str:
    """A row for each candidate; below them, what the moves cost beside a copy."""
    lines = [
        "| rows x length | work | by | call us | kernels us | x copy | GB/s | x sctd |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = ["x copy, GB/s and x sctd (the fastest of ours): by the kernels' time where there is one, else the call's"]
    for size, groups in results.items():
        for title, group in groups.items():
            lines += [f"| {size} | {title} | {cells} |" for cells in _cells(group)]
        together = groups[TOGETHER].compared()
        best = _best(together)
        ratio = together[best] / together[COPY]
        notes.append(f"{size}: {TOGETHER} takes {ratio:.2f}x the time of a {COPY} ({best})")
    return "\n".join(lines + notes)


def _cells(group: Group) -> list[str]:
    compared = group.compared()
    best = compared[_best(compared)]
    rows = []
    for name, seconds in compared.items():
        kernels = f"{1e6 * group.kernel_seconds[name]:,.1f}" if name in group.kernel_seconds else "-"
        copy = rate = "-"
        if group.moved is not None:
            copy, rate = f"{seconds / compared[COPY]:.2f}", f"{group.moved / seconds / 1e9:,.1f}"
        called = f"{1e6 * group.seconds[name]:,.1f}"
        rows.append(" | ".join((name, called, kernels, copy, rate, f"{seconds / best:.2f}")))
    return rows


def _best(seconds: dict[str, float]) -> str:
    return min((name for name in seconds if name.startswith(OURS)), key=lambda name: seconds[name])


def _backends() -> tuple[list[str], dict[str, str]]:
    """Backends that run natively here, and why the others do not."""
    if DEVICE.type != "cuda":
        return ["torch"], {}
    found, missing = [], {}
    scores_BS, seed_B = torch.zeros(1, 16, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for name in ("torch", "triton", "cuda"):
        try:
            for call in forward(ours([name], lambda: select(scores_BS, 8, seed_B))).values():
                call()
            found.append(name)
        except Exception as error:  # a compiler can fail in any way; whichever it is stands below the table
            missing[f"{OURS}{name}"] = " ".join(str(error).split())[:160] or type(error).__name__
    return found, missing

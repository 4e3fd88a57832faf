"""The kernels against what one would write without them, and against a plain copy of the same bytes."""

from pathlib import Path
from typing import Any

import torch

from sctd.bench.contenders import random_ltd_missing
from sctd.bench.result import write_result
from sctd.bench.timing import COPY, DEVICE, OURS, Comparison, forward, ours
from sctd.bench.work import TOGETHER, elementwise, moves
from sctd.config import Config
from sctd.present.table import Table, as_markdown
from sctd_kernels import select

Results = dict[str, dict[str, Comparison]]  # by size, by work


def bench_kernels(config: Config, sizes: list[tuple[int, int]], rounds: int, out: Path) -> None:
    """Print the table and write `kernels-PRECISION-<device>.json` into `out`."""
    backends, missing = _backends()
    ltd_missing = random_ltd_missing()
    if ltd_missing:
        missing["DeepSpeed random-LTD"] = ltd_missing
    repeat = 20 if DEVICE.type == "cuda" else 3
    results: Results = {}
    for rows, length in sizes:
        found = moves(config, rows, length, backends, ltd_missing is None)
        found |= elementwise(config, rows, length, [name for name in backends if name != "cuda"])
        for title, comparison in found.items():
            comparison.measure(rounds, repeat, f"{rows}x{length} {title}")
        results[f"{rows}x{length}"] = found
    print(as_markdown(table(results)))
    print("x copy, GB/s and x sctd (the fastest of ours): by the kernels' time where there is one, else the call's")
    for size, found in results.items():
        together, best = found[TOGETHER].compared(), found[TOGETHER].best()
        print(f"{size}: {TOGETHER} takes {together[best] / together[COPY]:.2f}x the time of a {COPY} ({best})")
    for who, why in missing.items():
        print(f"{who} is not in the table: {why}")
    result: dict[str, Any] = {"precision": config.train.precision, "rounds": rounds, "missing": missing}
    for key in ("seconds", "kernel_seconds", "moved"):
        result[key] = {size: {title: getattr(by[title], key) for title in by} for size, by in results.items()}
    print(f"written {write_result(out, f'kernels-{config.train.precision}', result)}")


def table(results: Results) -> Table:
    """A row for each candidate."""
    head = ("rows x length", "work", "by", "call us", "kernels us", "x copy", "GB/s", "x sctd")
    rows = []
    for size, found in results.items():
        for title, comparison in found.items():
            compared = comparison.compared()
            for name, seconds in compared.items():
                kernels = comparison.kernel_seconds.get(name)
                copy = rate = "-"
                if comparison.moved is not None:
                    copy, rate = f"{seconds / compared[COPY]:.2f}", f"{comparison.moved / seconds / 1e9:,.1f}"
                called = f"{1e6 * comparison.seconds[name]:,.1f}"
                own = "-" if kernels is None else f"{1e6 * kernels:,.1f}"
                rows.append(
                    (size, title, name, called, own, copy, rate, f"{seconds / compared[comparison.best()]:.2f}")
                )
    return Table("kernels", "", head, rows, texts=3)


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

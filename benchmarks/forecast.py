"""A model of 8 to 1,024 A100s: the recipes of BERT-base and BERT-large with SCTD, from bytes and bandwidths.

    python benchmarks/forecast.py

The step is that of `sctd plan`: matrix products, memory traffic and the exchange of gradients, one after another. Once
with the recipe's batch on all GPUs together (what a user waits for) and once with as many rows for each GPU as eight
have of it (what the links allow). To it come the checkpoint, by its bytes, and what failures cost. Nothing of this is
measured. Prints Markdown and writes results/forecast.json.
"""

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sctd.config import Config, load_config
from sctd.plan import speed
from sctd.plan.memory import parameter_count
from sctd.plan.report import forecast, parse_gpus
from sctd.plan.workload import make_workload

RESULTS = Path(__file__).parent / "results"
GPU = "A100-40GB"
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
SMALLEST = COUNTS[0]
STORAGE = 5e9  # bytes/s of a shared file system, for the whole job
STATE = 12  # bytes a parameter of a checkpoint: the float32 parameter and two moments
GPU_HOURS = 50_000.0  # between failures: 419 in 54 days on 16,384 GPUs (Llama 3, Dubey et al. 2024, section 3.3.4)
RESTART = 300.0  # seconds from a failure to the next step: the queue, imports, reading


def look(config: Config, gpus: int, rows: int) -> dict[str, Any]:
    """One number of GPUs with so many rows a step."""
    config = replace(config, train=replace(config.train, batch_size=rows))
    train = config.train
    workload = make_workload(config, config.model.max_positions)
    found = forecast(workload, parse_gpus(f"{gpus}x{GPU}"), train.zero_stage)
    assert found.time is not None
    step = found.time.total
    size = STATE * parameter_count(workload.work.shape)
    lost = train.save_every * step / 2 + RESTART  # of every failure
    return {
        "gpus": gpus, "rows": rows, "micro_batch": found.micro_batch, **asdict(found.time), "step": step,
        "rows_per_s": rows / step, "exchange_share": found.time.exchange / step, "days": train.steps * step / 86400,
        "checkpoint_bytes": size, "checkpoint_seconds": size / STORAGE,
        "save_interval_seconds": train.save_every * step, "lost_to_failures": lost / (GPU_HOURS * 3600 / gpus),
    }  # fmt: skip


def scaling(recipe: str) -> list[dict[str, Any]]:
    config = load_config(recipe, [])
    batch = config.train.batch_size
    found: list[dict[str, Any]] = []
    for gpus in COUNTS:
        strong, weak = look(config, gpus, batch), look(config, gpus, batch // SMALLEST * gpus)
        weak["efficiency"] = weak["rows_per_s"] / gpus / (found[0]["weak"]["rows_per_s"] / SMALLEST) if found else 1.0
        strong["speedup"] = found[0]["strong"]["step"] / strong["step"] if found else 1.0
        found.append({"strong": strong, "weak": weak})
    return found


def table(recipe: str, found: list[dict[str, Any]]) -> str:
    first = found[0]["strong"]
    lines = [
        f"{recipe}: {first['rows']} rows a step; {first['checkpoint_bytes'] / 1e9:.1f} GB a checkpoint, "
        f"{first['checkpoint_seconds']:.1f} s to write it",
        "",
        "| A100s | s a step | gradients | speed-up | days | to failures | weak: s a step | gradients | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for pair in found:
        strong, weak = pair["strong"], pair["weak"]
        lines.append(
            f"| {strong['gpus']:,} | {strong['step']:.3f} | {strong['exchange_share']:.0%} | {strong['speedup']:.1f} "
            f"| {strong['days']:.2f} | {strong['lost_to_failures']:.2%} "
            f"| {weak['step']:.3f} | {weak['exchange_share']:.0%} | {weak['efficiency']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    recipes = {recipe: scaling(recipe) for recipe in ("bert-base-sctd", "bert-large-sctd")}
    assumed = {
        "gpu": GPU, "products": speed.PRODUCTS, "attention": speed.ATTENTION, "bandwidth": speed.BANDWIDTH,
        "link": speed.LINK, "gpus_in_a_node": speed.NODE, "fabric_bytes_per_s_for_each_gpu": speed.FABRIC,
        "storage_bytes_per_s": STORAGE, "gpu_hours_between_failures": GPU_HOURS, "restart_seconds": RESTART,
    }  # fmt: skip
    print("\n\n".join(table(recipe, found) for recipe, found in recipes.items()))
    result = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "assumed": assumed, "recipes": recipes}
    path = RESULTS / "forecast.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()

"""Training step of each arm against `transformers.BertForMaskedLM`: one run, interleaved, medians.

Both sides: BERT-base in float32 under bfloat16 autocast, sdpa attention, attention dropout 0, hidden dropout 0.1, fused
AdamW, the same batch. Peak memory is that of a process of its own which runs two steps of one arm.

    python benchmarks/step.py                     # the table, and results/step-<device>.json
    python benchmarks/step.py --rounds 3 --sizes 4x128 --layers 4
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from common import device_name, write_result
from sctd.config import ObjectiveConfig
from sctd.data.masking import Masker
from sctd.model.bert import Bert, BertShape
from sctd.model.convert import to_hf_config
from sctd.model.token_dropping import LayerPlan, TokenDropping, kept_tokens
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase

INTERVAL = 10
PAD, UNK, CLS, SEP, MASK = SPECIAL = (0, 100, 101, 102, 103)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARMS = ("transformers", "full", "drop", "align")


def make_shape(layers: int, length: int) -> BertShape:
    return BertShape(30522, layers, 768, 12, 3072, length, dropout=0.1, attention_dropout=0.0)


def make_batch(rows: int, length: int) -> dict[str, Tensor]:
    import numpy as np

    generator = np.random.default_rng(0)
    ids = generator.integers(999, 30522, (rows, length))
    ids[:, 0], ids[:, -1] = CLS, SEP
    masked = Masker(0, 30522, MASK, SPECIAL, 0.15)(ids, np.arange(rows))
    batch = {
        "input_ids": torch.from_numpy(masked.input_ids_BS),
        "positions": torch.from_numpy(masked.positions_BM),
        "labels": torch.from_numpy(masked.labels_BM),
        "row_seed": torch.arange(rows),
    }
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def make_step(arm: str, shape: BertShape, batch: dict[str, Tensor]) -> Callable[[], None]:
    """A function that does one training step of the arm and waits for its end."""
    torch.manual_seed(0)
    if arm == "transformers":
        model = transformers.BertForMaskedLM._from_config(to_hf_config(shape, PAD), attn_implementation="sdpa")
        labels = torch.full_like(batch["input_ids"], -100).scatter_(1, batch["positions"], batch["labels"])

        def forward() -> Tensor:
            return model(input_ids=batch["input_ids"], labels=labels).loss
    else:
        plan = LayerPlan(shape.layers, shape.layers // 2 - 1, 1)
        table = ImportanceTable(shape.vocab_size, SPECIAL, 0.995, DEVICE)
        model = PretrainingModel(Bert(shape), plan, ObjectiveConfig(), TokenDropping((CLS, SEP, MASK, UNK), PAD), table)
        keep = kept_tokens(0.5, batch["input_ids"].shape[1])
        phase = Phase(arm)

        def forward() -> Tensor:
            loss, _ = model(**batch, phase=phase, keep=keep)
            table.commit(True)
            return loss

    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(rows: int, length: int, layers: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each arm, the arms taking turns."""
    shape, batch = make_shape(layers, length), make_batch(rows, length)
    steps = {arm: make_step(arm, shape, batch) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for round_ in range(rounds + 1):
        for arm, step in steps.items():
            start = time.perf_counter()
            step()
            if round_:  # the first round warms up
                seconds[arm].append(time.perf_counter() - start)
        print(f"  {rows}x{length} round {round_}/{rounds}", file=sys.stderr)
    medians = {arm: statistics.median(times) for arm, times in seconds.items()}
    medians["sctd"] = ((INTERVAL - 1) * medians["drop"] + medians["align"]) / INTERVAL
    return medians


def peak_memory(arm: str, rows: int, length: int, layers: int) -> float:
    """Peak MiB of a fresh process that runs two steps of one arm."""
    command = [sys.executable, __file__, "--memory-of", arm, "--sizes", f"{rows}x{length}", "--layers", str(layers)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(arm: str, rows: int, length: int, layers: int) -> None:
    step = make_step(arm, make_shape(layers, length), make_batch(rows, length))
    step(), step()
    if DEVICE.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        # Not ru_maxrss: a child starts with its parent's.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10)


def table(sizes: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| batch x length | path | ms / step | x transformers | / full | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    names = {"full": "baseline (full)", "drop": "token drop", "align": "SCTD's ALIGN step", "sctd": "SCTD, mean step"}
    for size, result in sizes.items():
        seconds, memory = result["seconds"], result["peak_mib"]
        for arm in ("transformers", "full", "drop", "align", "sctd"):
            peak = f"{memory[arm]:,.0f}" if arm in memory else "as ALIGN"
            lines.append(
                f"| {size} | {names.get(arm, arm)} | {1e3 * seconds[arm]:,.0f} | "
                f"{seconds['transformers'] / seconds[arm]:.2f} | {seconds[arm] / seconds['full']:.3f} | {peak} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4x512", "16x128"], metavar="ROWSxLENGTH")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [tuple(int(part) for part in size.split("x")) for size in args.sizes]
    if args.memory_of:
        print_peak_memory(args.memory_of, *sizes[0], args.layers)
        return
    results = {}
    for rows, length in sizes:
        results[f"{rows}x{length}"] = {
            "seconds": measure(rows, length, args.layers, args.rounds),
            "peak_mib": {arm: peak_memory(arm, rows, length, args.layers) for arm in ARMS},
        }
    print(table(results))
    name = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = write_result(f"step-{name}", {"layers": args.layers, "rounds": args.rounds, "sizes": results})
    print(json.dumps({"written": path.name}))


if __name__ == "__main__":
    main()

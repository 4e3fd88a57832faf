"""The three arms on the same real text for the same steps: held-out loss curves in one picture.

    python benchmarks/arms.py --source "wiki-train-0.jsonl.xz" --tokenizer vocab.txt --work runs/arms

Each arm is `bert-mini` on rows of 128 tokens under the deepspeed launcher, two ranks, ZeRO-1, one seed. Writes
results/arms-<device>.json and docs/arms.png. An arm whose run is complete in --work is not trained again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

from sctd.bench.result import write_result

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ARMS = {"baseline": "#666666", "token-drop": "#d1742b", "sctd": "#2b6cb0"}
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def train(arm: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Metrics of the finished run of one arm."""
    run_dir = args.work / arm
    if not (run_dir / "export").is_dir():
        overrides = [
            f"data.corpus={args.work / 'corpus'}", f"run.dir={run_dir}", f"train.steps={args.steps}",
            f"schedule.warmup_steps={args.steps // 5}", "train.batch_size=64", "train.precision=fp32",
            "train.zero_stage=1", f"train.valid_every={args.steps // 10}", "train.valid_rows=512",
        ]  # fmt: skip
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [launcher, "--num_accelerators", str(args.ranks), "--module", "sctd", "pretrain", f"bert-mini-{arm}"]
        subprocess.run([*command, *overrides], check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def draw(curves: dict[str, list[dict[str, Any]]], entropy: float, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for arm, points in curves.items():
        losses = [point["valid_loss"] for point in points]
        axis.plot([point["step"] for point in points], losses, ".-", color=ARMS[arm], label=arm)
    axis.axhline(entropy, color="#999999", lw=0.8, ls=":")
    axis.annotate("unigram entropy", (0.02, entropy), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("held-out MLM loss, full path (nats)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/arms"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    prepare = ["--source", args.source, "--tokenizer", args.tokenizer, "--seq-len", "128"]
    corpus = args.work / "corpus"
    subprocess.run([sys.executable, "-m", "sctd", "prepare", *prepare, "--out", corpus], check=True)
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    keys = ("step", "valid_loss", "valid_accuracy")
    curves = {}
    for arm in ARMS:
        metrics = train(arm, args)
        curves[arm] = [{key: r[key] for key in keys} for r in metrics if r.get("valid_loss") is not None]
    entropy = manifest["unigram_entropy"]
    DOCS.mkdir(exist_ok=True)
    draw(curves, entropy, DOCS / "arms.png")
    result = {
        "recipe": "bert-mini", "ranks": args.ranks, "zero_stage": 1, "precision": "fp32", "steps": args.steps,
        "batch": "64x128", "source": Path(args.source).name, "unigram_entropy": entropy,
        "curves": curves,
    }  # fmt: skip
    path = write_result(RESULTS, "arms", result)
    for arm, points in curves.items():
        print(f"{arm:<12} held-out loss {points[0]['valid_loss']:.3f} -> {points[-1]['valid_loss']:.3f}")
    print(f"unigram entropy {entropy:.3f}; written {path.name} and docs/arms.png")


if __name__ == "__main__":
    main()

"""What to predict: single tokens, whole words, spans of words, or tokens by importance. By held-out loss.

    python benchmarks/masking.py --work runs/masking

The model of the recipe `demo`, arm `baseline`, 600 steps on the documentation that Python carries, three seeds. All
runs are validated on the same rows with the same masks, single tokens drawn uniformly: `data.span_length=1` is whole
words in training alone. A run that is in the results, or complete in --work, is not trained again, one that is not goes
on. Writes results/masking.json after each run, and prints a table of it.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import learning

COMMON = (*learning.SHORT, *learning.ROTARY, *learning.MUON)
RUNS: learning.Runs = {
    "tokens": COMMON,
    "whole words": (*COMMON, "data.span_length=1"),
    "spans of 3 words": (*COMMON, "data.span_length=3"),
    "tokens by importance": (*COMMON, "data.mask_by=importance"),
}
PATH = learning.RESULTS / "masking.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/masking"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the runs do, which the results say
    corpus, found = args.work / "corpus", learning.read(PATH)
    _, prepare, _ = learning.SUITES["embedded"]
    learning.sctd("prepare", *prepare, "--seq-len", "128", "--out", str(corpus))
    entropy = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))["unigram_entropy"]
    jobs = [(name, seed) for seed in args.seeds for name in RUNS]
    jobs = [(name, seed) for name, seed in jobs if str(seed) not in found.get(name, {"seeds": {}})["seeds"]]

    def work(job: tuple[str, int]) -> None:
        learning.train(args.work, corpus, *job, RUNS[job[0]])

    with ThreadPoolExecutor(args.jobs) as pool:
        for (name, seed), _ in zip(jobs, pool.map(work, jobs), strict=True):
            entry = found.setdefault(name, {"overrides": RUNS[name], "seeds": {}})
            entry["seeds"][str(seed)] = learning.collect(learning.folder(args.work, name, seed))
            result = {"unigram_entropy": entropy, "runs": {name: found[name] for name in RUNS if name in found}}
            PATH.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(found)))


def table(found: dict[str, Any]) -> list[str]:
    """Held-out loss of each way, and its differences to single tokens seed by seed."""
    lines = [
        "| training predicts | seeds | held-out loss | to tokens, by seed | masked accuracy |",
        "|---|---|---|---|---|",
    ]
    last = {name: {seed: each["curve"][-1] for seed, each in entry["seeds"].items()} for name, entry in found.items()}
    for name in RUNS:
        points = last.get(name, {})
        if not points:
            continue
        loss, accuracy = (
            statistics.mean(point[key] for point in points.values()) for key in ("valid_loss", "valid_accuracy")
        )
        base = last.get("tokens", {})
        apart = ", ".join(
            f"{point['valid_loss'] - base[seed]['valid_loss']:+.3f}" for seed, point in points.items() if seed in base
        )
        lines.append(f"| {name} | {len(points)} | {loss:.3f} | {apart} | {accuracy:.1%} |")
    return lines


if __name__ == "__main__":
    main()

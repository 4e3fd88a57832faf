"""The same run on every ZeRO stage, with offload, on two and three ranks, for every arm: how far the losses part.

    python benchmarks/parallel.py --corpus runs/demo-corpus

30 steps of a small model, every fourth an ALIGN step of the sctd arm; each run against one process without ZeRO in
float32, and its importance table too. Dropout is off: its draws for attention belong to a rank. Writes
results/parallel-<device>.json.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from sctd.bench.result import write_result
from sctd.jobs.verify import start
from sctd.objective.arms import ARMS
from sctd.train.keep.checkpoint import newest_whole, read_importance
from sctd.train.keep.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
STEPS = 30
SMALL = [
    "model.layers=4", "model.hidden_size=64", "model.heads=2", "model.intermediate_size=128", "model.dropout=0",
    "model.attention_dropout=0", "objective.interval=4", f"train.steps={STEPS}", "schedule.warmup_steps=5",
    "train.batch_size=12", "train.micro_batch_size=2", "train.log_every=1", "train.valid_rows=12",
    "run.examples=[]", "optimizer.name=adamw", "schedule.full_start=0", "schedule.full_finish=0",
    "schedule.decay_steps=0",
]  # fmt: skip
STAGES = {
    **{f"ZeRO-{stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    "ZeRO-1, offload": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "ZeRO-3, offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def run(arm: str, stage: str, ranks: int, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Losses and importance scores of one run."""
    name = f"{arm}-{stage}-{ranks}-{precision}".replace(", ", "-")
    run_dir, config = args.work / name, args.work / f"{name}.json"
    config.write_text(json.dumps({"zero_optimization": STAGES[stage]}), encoding="utf-8")
    words = [
        "demo-bert",
        f"arm={arm}",
        f"data.corpus={args.corpus}",
        f"run.dir={run_dir}",
        f"train.precision={precision}",
    ]
    log = args.work / f"{name}.log"
    code = start([*words, *SMALL, "--deepspeed_config", config], ranks, log).wait()
    if code != 0:
        raise SystemExit(f"{name} ended with exit code {code}: see {log}")
    path = newest_whole(run_dir)
    assert path is not None
    scores = read_importance(path)
    return {
        "losses": [record["loss"] for record in read_metrics(run_dir)],
        "phases": [record["phase"] for record in read_metrics(run_dir)],
        "skipped_steps": read_metrics(run_dir)[-1]["skipped_steps"],
        "importance": None if scores is None else scores.tolist(),
    }


def farthest(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="rows of 128 tokens or fewer")
    parser.add_argument("--work", type=Path, default=Path("runs/parallel"))
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    rows = []
    for arm in ARMS:
        alone = run(arm, "ZeRO-0", 1, "fp32", args)
        assert len(alone["losses"]) == STEPS
        precisions = ("fp32", "bf16", "fp16") if arm == "sctd" else ("fp32",)
        for precision in precisions:
            for stage in STAGES:
                for ranks in (2, 3):
                    found = run(arm, stage, ranks, precision, args)
                    assert found["phases"] == alone["phases"]
                    row = {"arm": arm, "precision": precision, "stage": stage, "ranks": ranks}
                    row["skipped_steps"] = found["skipped_steps"]
                    row["losses_within"] = farthest(found["losses"], alone["losses"])
                    if alone["importance"] is not None:
                        row["importance_within"] = farthest(found["importance"], alone["importance"])
                    rows.append(row)
                    print(row, flush=True)
    print(write_result(RESULTS, "parallel", {"steps": STEPS, "runs": rows}))


if __name__ == "__main__":
    main()

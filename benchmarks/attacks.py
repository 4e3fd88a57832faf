"""A run that is killed again and again, and what it has lost at its end.

    python benchmarks/attacks.py --corpus runs/demo-corpus --kills 50

A small run of two ranks saves every third step. It is ended by SIGKILL, all its processes at once, at moments drawn at
random: every other time between its start and a little beyond its usual end, every other time within a save, while the
folder of a checkpoint still has its temporary name. It is then resumed, and killed again. When it comes to its end, its
parameters, losses and ledger are compared with those of a run that was left alone, and it begins anew, until there have
been enough kills. Writes results/attacks-<device>.json.
"""

import argparse
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

from sctd.bench.result import write_result
from sctd.train.keep.metrics import read_metrics
from sctd.verify import compare, kill, start

RESULTS = Path(__file__).parent / "results"
SMALL = [
    "model.layers=4", "model.hidden_size=192", "model.heads=3", "model.intermediate_size=768", "model.dropout=0.1",
    "model.attention_dropout=0.1", "objective.interval=4", "train.steps=60", "schedule.warmup_steps=5",
    "train.batch_size=8", "train.log_every=1", "train.save_every=3", "train.valid_rows=16", "train.zero_stage=1",
    "run.examples=[]", "schedule.full_start=0", "schedule.full_finish=0", "schedule.decay_steps=0",
    "optimizer.name=adamw",
]  # fmt: skip


def begin(run_dir: Path, args: argparse.Namespace) -> "subprocess.Popen[bytes]":
    resume = ["--resume"] if run_dir.exists() else []
    words = ["demo-bert", *SMALL, f"data.corpus={args.corpus}", f"run.dir={run_dir}", *resume]
    return start(words, args.ranks, log_of(args))


def log_of(args: argparse.Namespace) -> Path:
    return args.work / "log.txt"


def unfinished(run_dir: Path) -> set[Path]:
    return set(run_dir.glob("checkpoints/.step-*.tmp"))


def wait(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """Its exit code; None if it still runs then."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def in_a_save(process: "subprocess.Popen[bytes]", run_dir: Path, old: set[Path], chance: random.Random) -> int | None:
    """None at a moment of a save, of the next one or one of those behind it; the exit code if none comes."""
    passed_over = chance.randrange(10)
    while process.poll() is None:
        new = unfinished(run_dir) - old
        if new and passed_over == 0:
            time.sleep(chance.uniform(0.0, 0.05))
            return None
        if new:
            passed_over -= 1
            while new & unfinished(run_dir) and process.poll() is None:
                time.sleep(0.001)
        time.sleep(0.001)
    return process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="rows of 128 tokens or fewer")
    parser.add_argument("--work", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    log, chance = log_of(args), random.Random(args.seed)
    began = time.monotonic()
    assert begin(args.work / "whole", args).wait() == 0, f"see {log}"
    usual = time.monotonic() - began

    kills, finished, failed = [], [], 0
    while len(kills) < args.kills:
        run_dir = args.work / f"run-{len(finished)}"
        while True:
            old = unfinished(run_dir)  # what the kill before left lying
            begun, process = time.monotonic(), begin(run_dir, args)
            if len(kills) % 2:
                code = in_a_save(process, run_dir, old, chance)
            else:
                code = wait(process, chance.uniform(0.0, 1.2 * usual))
            if code is None:
                kill(process)
                records = read_metrics(run_dir)
                kills.append({
                    "second": time.monotonic() - begun, "step": records[-1]["step"] if records else 0,
                    "in_a_save": bool(unfinished(run_dir) - old),
                })  # fmt: skip
                print(f"kill {len(kills)}: {kills[-1]}", flush=True)
                continue
            if code == 0:
                break
            failed += 1
            print(f"run {run_dir} ended with {code}: see {log}")
            if failed > 3:
                raise SystemExit(1)
        finished.append(compare(run_dir, args.work / "whole").bitwise)
        print(f"run {len(finished)} came to its end: {'bit for bit the same' if finished[-1] else 'DIFFERENT'}")
    said = re.findall(r"is damaged \((.*?)\)", log.read_text(encoding="utf-8"))
    result = {
        "ranks": args.ranks, "steps": 60, "save_every": 3, "kills": kills, "failed_starts": failed,
        "runs_finished": len(finished), "runs_bitwise_equal": sum(finished), "damaged_checkpoints_passed_over": said,
    }  # fmt: skip
    print(f"{len(kills)} kills, {sum(kill['in_a_save'] for kill in kills)} of them in a save: {sum(finished)} of")
    print(f"{len(finished)} runs ended bit for bit as the one left alone; {write_result(RESULTS, 'attacks', result)}")


if __name__ == "__main__":
    main()

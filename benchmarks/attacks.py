"""A run that is killed again and again, and what it has lost at its end.

    python benchmarks/attacks.py --corpus runs/demo-corpus --kills 50

A small run of two ranks saves every third step. It is ended by SIGKILL, all its processes at once, at moments drawn at
random between its start and a little beyond its usual end; saves are hit too. It is then resumed, and killed again.
When it comes to its end, its parameters, losses and ledger are compared with those of a run that was left alone, and
it begins anew, until there have been enough kills. Writes results/attacks-<device>.json.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sctd.bench.result import write_result
from sctd.train.launch import free_port
from sctd.train.monitor import read_metrics

RESULTS = Path(__file__).parent / "results"
SMALL = [
    "model.layers=4", "model.hidden_size=64", "model.heads=2", "model.intermediate_size=128", "model.dropout=0.1",
    "model.attention_dropout=0.1", "objective.interval=4", "train.steps=60", "schedule.warmup_steps=5",
    "train.batch_size=8", "train.log_every=1", "train.save_every=3", "train.valid_rows=16", "train.zero_stage=1",
    "run.examples=[]",
]  # fmt: skip


def start(run_dir: Path, corpus: Path, ranks: int, log: Path) -> "subprocess.Popen[bytes]":
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", str(ranks)]
    command = [*launcher, "--master-port", str(free_port()), "-m", "sctd", "pretrain", "demo", *SMALL]
    command += [f"data.corpus={corpus}", f"run.dir={run_dir}"]
    if run_dir.exists():
        command.append("--resume")
    with log.open("ab") as out:
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to the launcher and, since torchrun gives them sessions of their own, to each of its ranks."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in (process.pid, *map(int, found.stdout.split())):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def outcome(run_dir: Path) -> dict[str, Any]:
    records = read_metrics(run_dir)
    keys = ("step", "phase", "loss", "lr", "samples", "ledger")
    return {
        "records": [[record[key] for key in keys] for record in records],
        "weights": load_file(run_dir / "export" / "model.safetensors"),
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    names = left["weights"].keys()
    return (
        left["records"] == right["records"]
        and names == right["weights"].keys()
        and all(left["weights"][name].equal(right["weights"][name]) for name in names)
    )


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
    log, chance = args.work / "log.txt", random.Random(args.seed)
    began = time.monotonic()
    assert start(args.work / "whole", args.corpus, args.ranks, log).wait() == 0, f"see {log}"
    usual = time.monotonic() - began
    whole = outcome(args.work / "whole")

    kills, finished, failed = [], [], 0
    while len(kills) < args.kills:
        run_dir = args.work / f"run-{len(finished)}"
        while True:
            process = start(run_dir, args.corpus, args.ranks, log)
            moment = chance.uniform(0.0, 1.2 * usual)
            try:
                code = process.wait(moment)
            except subprocess.TimeoutExpired:
                kill_all(process)
                records = read_metrics(run_dir)
                torn = len(list(run_dir.glob("checkpoints/.step-*.tmp")))
                kills.append({"second": moment, "step": records[-1]["step"] if records else 0, "in_a_save": torn > 0})
                print(f"kill {len(kills)} at {moment:.1f} s, step {kills[-1]['step']}", "in a save" if torn else "")
                continue
            if code == 0:
                break
            failed += 1
            print(f"run {run_dir} ended with {code}: see {log}")
            if failed > 3:
                raise SystemExit(1)
        finished.append(same(outcome(run_dir), whole))
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

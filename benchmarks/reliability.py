"""What reliability costs, and what a run that is killed again and again has lost at its end.

    python benchmarks/reliability.py costs --corpus runs/demo-corpus
    python benchmarks/reliability.py attacks --corpus runs/demo-corpus --kills 50

`costs`: BERT-base in float32, random rows, one process. Seconds that a save keeps training waiting, written behind it
and waited for, beside a step; bandwidth of a save and of a verified load beside a plain copy of the same bytes with
sha256; seconds of a restore beyond reading. The guards (requests, losses, pace, skips) beside a step. Then throughput
of one and of two gloo ranks on a smaller model, with one thread each. Writes results/reliability-<device>.json.

`attacks`: a small run of two ranks saves every third step. It is ended by SIGKILL, all its processes at once, at
moments drawn at random: every other time between its start and a little beyond its usual end, every other time within a
save, while the folder of a checkpoint still has its temporary name. It is then resumed, and killed again. When it comes
to its end, its parameters, losses and ledger are compared with those of a run that was left alone, and it begins anew,
until there have been enough kills. Writes results/attacks-<device>.json.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sctd.bench.result import write_result
from sctd.config import TrainConfig, load_config
from sctd.corpus.tokenizer import SpecialIds
from sctd.jobs.verify import compare, kill, start
from sctd.model.bert import BertShape
from sctd.objective.build import build_hook, build_model
from sctd.signals import Mailbox
from sctd.train.engine.distributed import World, init_world
from sctd.train.engine.engine import StepWatch, build_engine
from sctd.train.engine.launch import discover
from sctd.train.engine.resolve import resolve
from sctd.train.keep import checkpoint
from sctd.train.keep.checkpoint import Progress, Saver
from sctd.train.keep.metrics import read_metrics
from sctd.train.keep.preemption import Requests
from sctd.train.loop.guards import Curve, Pace, Skips

RESULTS = Path(__file__).parent / "results"


def seconds(call: Callable[[], Any], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return found


def engine_of(world: World, rows: int, length: int) -> tuple[Any, Callable[[], None]]:
    """BERT-base on an engine, and one step of it."""
    overrides = [f"train.batch_size={rows}", "train.precision=fp32", "train.zero_stage=1", "model.attention_dropout=0"]
    config, ds_config = resolve(load_config("bert-base-sctd", overrides), {}, world.size)
    model = config.model
    shape = BertShape(
        vocab_size=30528, layers=model.layers, hidden_size=model.hidden_size, heads=model.heads,
        intermediate_size=model.intermediate_size, max_positions=model.max_positions, dropout=model.dropout,
        attention_dropout=0.0, layer_norm_eps=model.layer_norm_eps, initializer_range=model.initializer_range,
    )  # fmt: skip
    torch.manual_seed(1)
    special = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
    engine = build_engine(build_model(config, shape, special, world.device), config, ds_config,
                          build_hook(config, length), world)  # fmt: skip
    targets = length * 15 // 100
    ids = torch.randint(5, 30000, (rows, length))
    ids[:, 0] = special.cls
    positions = torch.stack([torch.randperm(length - 1)[:targets].sort().values + 1 for _ in range(rows)])
    batch = {
        "input_ids": ids, "positions": positions, "labels": ids.gather(1, positions), "row_seed": torch.arange(rows)
    }  # fmt: skip

    def step() -> None:
        loss, _ = engine(**batch)
        engine.backward(loss)
        engine.step()

    return engine, step


def plain_copy(source: Path, target: Path) -> None:
    """Every file read, hashed, written and fsynced."""
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (target / file.name).open("wb") as write:
            digest = hashlib.sha256()
            while block := read.read(1 << 22):
                digest.update(block)
                write.write(block)
            write.flush()
            os.fsync(write.fileno())


def saves(world: World, work: Path, rounds: int) -> dict[str, Any]:
    engine, step = engine_of(world, 4, 128)
    for _ in range(2):
        step()
    found: dict[str, Any] = {"step_seconds": seconds(step, rounds)}
    identity = {"tokenizer": "", "data": ""}
    for behind in (True, False):
        cfg = TrainConfig(keep_checkpoints=1, async_save=behind, timeout=600.0)
        saver = Saver(engine, work / "run", identity, world, cfg)
        stalls, wholes = [], []
        for number in range(rounds):
            begin = time.perf_counter()
            saver.save(Progress(step=number + 1 + 100 * behind))
            stalls.append(time.perf_counter() - begin)
            saver.wait()
            wholes.append(time.perf_counter() - begin)
        found["behind" if behind else "waited"] = {"stall_seconds": stalls, "until_on_disk": wholes}
    path = checkpoint.newest_whole(work / "run")
    assert path is not None
    size = checkpoint.size_of(path)
    target = work / "copy"

    def copy() -> None:
        shutil.rmtree(target, ignore_errors=True)
        plain_copy(path, target)

    found |= {
        "bytes": size,
        "copy_with_sha256": seconds(copy, rounds),
        "read_with_sha256": seconds(lambda: [hashlib.sha256(file.read_bytes()) for file in path.iterdir()], rounds),
        "verify": seconds(lambda: checkpoint.verify(path), rounds),
        "restore": seconds(lambda: checkpoint.load(engine, path), rounds),
        "read": seconds(lambda: [file.read_bytes() for file in path.iterdir()], rounds),
    }
    guard, pace, skips = Requests(Mailbox(), work, world, 600.0), Pace(world.device), Skips(5, "fp32")
    curve, record = Curve(0), {"step": 1, "samples": 0, "mlm_drop": 5.0, "mlm_full": None}

    def guards() -> None:
        with pace.forward():
            pass
        skips.add(True, 0, 4)
        guard.agree()
        list(curve.look(record))
        pace.read()

    found["guards_seconds"] = statistics.median(seconds(guards, 2000))
    norm = StepWatch(engine)
    found["applied_seconds"] = statistics.median(seconds(norm.applied, 200))
    return found


def scaling(work: Path, corpus: Path, rounds: int) -> dict[str, Any]:
    """Tokens a second of one rank, of two ranks that are one run, and of two runs side by side that share nothing but
    the machine; one thread and the same rows for each rank, in turns. What two runs lose against twice one is the
    machine's memory; what one run of two ranks loses beyond that is communication, and waiting for one another."""
    words = [
        "model.layers=6", "model.hidden_size=256", "model.heads=4", "model.intermediate_size=1024", "train.steps=25",
        "train.log_every=5", "train.zero_stage=1", "train.precision=fp32", "train.valid_rows=2",
        "train.micro_batch_size=16", "run.examples=[]", "schedule.warmup_steps=2", f"data.corpus={corpus}",
        "optimizer.name=adamw", "schedule.full_start=0", "schedule.full_finish=0", "schedule.decay_steps=0",
    ]  # fmt: skip
    found: dict[str, Any] = {"alone": [], "together": [], "apart": []}
    for number in range(rounds):
        for name, runs, ranks in (("alone", 1, 1), ("together", 1, 2), ("apart", 2, 1)):
            folders = [work / f"scaling-{number}-{name}-{run}" for run in range(runs)]
            log = work / "scaling.log"
            started = [
                start(["demo-bert", *words, f"train.batch_size={16 * ranks}", f"run.dir={folder}"], ranks, log)
                for folder in folders
            ]
            if any(run.wait() != 0 for run in started):
                raise SystemExit(f"a run failed: see {log}")
            speeds = [
                statistics.median(record["tokens_per_s"] for record in read_metrics(folder)[2:]) for folder in folders
            ]
            found[name].append(sum(speeds))
    alone, together, apart = (statistics.median(found[name]) for name in ("alone", "together", "apart"))
    return found | {"efficiency": together / (2 * alone), "communication_share": 1 - together / apart}


def measure_costs(args: argparse.Namespace) -> None:
    # First: the runs must not inherit this process's place in a group of its own.
    os.environ["OMP_NUM_THREADS"] = "1"
    scaled = scaling(args.work, args.corpus, 3)
    del os.environ["OMP_NUM_THREADS"]
    found = saves(init_world(discover(os.environ), 600.0), args.work, args.rounds) | {"scaling": scaled}
    print(json.dumps(found, indent=1))
    print(write_result(RESULTS, "reliability", found))


# ---- attacks -------------------------------------------------------------------------------------------------------

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


def attack(args: argparse.Namespace) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["costs", "attacks"])
    parser.add_argument("--corpus", type=Path, required=True, help="rows of 128 tokens or fewer")
    parser.add_argument("--work", type=Path, default=Path("runs/reliability"))
    parser.add_argument("--rounds", type=int, default=5, help="of the costs (default %(default)s)")
    parser.add_argument("--kills", type=int, default=50, help="default %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="of the run that is killed (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default %(default)s)")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    (measure_costs if args.what == "costs" else attack)(args)


if __name__ == "__main__":
    main()

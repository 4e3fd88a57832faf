"""What reliability costs: saves, resumes, guards and a second rank.

    python benchmarks/reliability.py

BERT-base in float32, random rows. One process: seconds that a save keeps training waiting, written behind it and waited
for, beside a step; bandwidth of a save and of a verified load beside a plain copy of the same bytes with sha256;
seconds of a restore beyond reading. The guards (requests, losses, pace, skips) beside a step. Then throughput of one
and of two gloo ranks on a smaller model, with one thread each. Writes results/reliability-<device>.json.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sctd.bench.result import write_result
from sctd.config import load_config
from sctd.corpus.tokenizer import SpecialIds
from sctd.model.bert import BertShape
from sctd.objective.build import build_hook, build_model
from sctd.train.engine.distributed import World, init_world
from sctd.train.engine.engine import StepWatch, build_engine, resolve
from sctd.train.engine.launch import discover
from sctd.train.keep import checkpoint
from sctd.train.keep.checkpoint import Progress, Saver
from sctd.train.keep.metrics import read_metrics
from sctd.train.keep.preemption import Mailbox, Requests
from sctd.train.loop.guards import Curve, Pace, Skips
from sctd.verify import start

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
        saver = Saver(engine, work / "run", identity, world, 1, behind, 600.0)
        stalls, wholes = [], []
        for number in range(rounds):
            begin = time.perf_counter()
            saver.save(Progress(step=number + 1 + 100 * behind), None)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="rows of 128 tokens or fewer")
    parser.add_argument("--work", type=Path, default=Path("runs/reliability"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    # First: the runs must not inherit this process's place in a group of its own.
    os.environ["OMP_NUM_THREADS"] = "1"
    scaled = scaling(args.work, args.corpus, 3)
    del os.environ["OMP_NUM_THREADS"]
    found = saves(init_world(discover(os.environ), 600.0), args.work, args.rounds) | {"scaling": scaled}
    print(json.dumps(found, indent=1))
    print(write_result(RESULTS, "reliability", found))


if __name__ == "__main__":
    main()

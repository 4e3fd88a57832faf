"""The proof that a run which is killed and resumed ends as one that was not: `sctd verify-resume`."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctd.config import load_config
from sctd.errors import UserError
from sctd.files import free_port
from sctd.signals import kill_tree
from sctd.train.keep.checkpoint import checkpoint_folder, newest_whole, read_manifest, read_weights
from sctd.train.keep.export import read_run
from sctd.train.keep.metrics import LOSSES, read_metrics

# How far a loss may move on another number of ranks, which adds the same gradients in another order.
_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
_DATA = ("step", "phase", "samples", "ledger")
_PATIENCE = 600.0  # seconds until the first checkpoint


@dataclass(frozen=True)
class Deviation:
    """How far two runs ended from each other; `bitwise`: not at all."""

    losses: float
    weights: float
    same_data: bool
    bitwise: bool


def verify_resume(recipe: str, overrides: Sequence[str], ranks: int, resume_ranks: int, steps: int) -> bool:
    """Train, SIGKILL after a checkpoint, resume for `steps` more, and compare with an uninterrupted run.

    On another number of ranks the data must be the same and the losses equal within rounding; on the same number
    everything must be equal, bit for bit. Runs and logs stay in `run.dir`.

    Raises:
        UserError: a folder that is in use, a recipe too short to be killed in, or a run that failed.
    """
    elastic = ranks != resume_ranks
    # Attention's dropout is drawn for each rank; everything else that is random belongs to the rows.
    overrides = [*overrides, *(["model.attention_dropout=0"] if elastic else [])]
    # So few steps would all be in a full start; the proof is about steps that drop.
    overrides = ["schedule.full_start=0", "schedule.full_finish=0", *overrides]
    config = load_config(recipe, overrides)
    _check_length(config.train.steps, 2 * steps)
    folder = Path(config.run.dir)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"run.dir {folder} is not empty: verify-resume makes its own runs there, choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    common = [recipe, *overrides, "train.log_every=1", f"train.save_every={steps}", "run.examples=[]"]

    killed, whole = folder / "killed", folder / "whole"
    print(f"1/3  {ranks} ranks to step {steps} or soon after, ended by SIGKILL")
    _kill_after_checkpoint([*common, f"run.dir={killed}"], ranks, killed, steps)
    path = newest_whole(killed)
    assert path is not None
    start = read_manifest(path)["step"]
    precision = read_run(killed).train.precision  # what `auto` chose; it might choose another the next time
    goal = start + steps
    _check_length(config.train.steps, goal)
    common.append(f"train.stop_at={goal}")
    print(f"2/3  resumed at step {start} on {resume_ranks} ranks, to step {goal}")
    _run([*common, f"run.dir={killed}", "--resume"], resume_ranks, killed)
    print(f"3/3  {ranks} ranks to step {goal} without interruption")
    _run([*common, f"train.precision={precision}", f"run.dir={whole}"], ranks, whole)

    found, tolerance = compare(killed, whole), _TOLERANCE[precision]
    good = found.same_data and (found.losses <= tolerance if elastic else found.bitwise)
    print(f"data       {'the same rows in the same order' if found.same_data else 'DIFFERENT'}")
    for name, value in (("losses", found.losses), ("parameters", found.weights)):
        print(f"{name:10} {'bit for bit the same' if found.bitwise else f'within {value:.2g}'}")
    wanted = f"losses within {tolerance:g} on another number of ranks" if elastic else "all bit for bit the same"
    print(f"{'OK' if good else 'FAILED'}: {wanted}")
    return good


def _check_length(available: int, needed: int) -> None:
    if needed > available:
        raise UserError(f"train.steps is {available}, but the proof needs {needed}: raise it, or lower --steps")


def compare(run: Path, other: Path) -> Deviation:
    """Two finished runs: their metrics step by step, and the parameters of their newest checkpoints."""
    left, right = ([record for record in read_metrics(each) if record["step"]] for each in (run, other))
    one, two = (read_weights(path) for path in map(newest_whole, (run, other)) if path is not None)
    pairs = [(a[key], b[key]) for a, b in zip(left, right, strict=False) for key in LOSSES]

    def same(*keys: str) -> bool:
        return [[record[key] for key in keys] for record in left] == [[record[key] for key in keys] for record in right]

    return Deviation(
        losses=max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0),
        weights=max(float((one[name] - two[name]).abs().max()) for name in one),
        same_data=same(*_DATA),
        bitwise=same(*_DATA, *LOSSES, "lr") and one.keys() == two.keys() and all(one[n].equal(two[n]) for n in one),
    )


def start(arguments: Sequence[Any], ranks: int, log: Path) -> "subprocess.Popen[bytes]":
    """`sctd pretrain ARGUMENTS` on so many processes of this machine, their output appended to `log`."""
    command = [sys.executable, "-m", "sctd"]
    if ranks > 1:
        launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        command = [sys.executable, "-m", *launcher, "-m", "sctd"]
    command += ["pretrain", *map(str, arguments)]
    # What another job's launcher says of this process is not about the run.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI"))}
    with log.open("ab") as out:
        return subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to a process and all its descendants, at one moment."""
    if process.poll() is None:
        kill_tree(process.pid)
    process.wait()


def _kill_after_checkpoint(arguments: Sequence[Any], ranks: int, run_dir: Path, steps: int) -> None:
    log = run_dir.with_suffix(".log")
    process, deadline = start(arguments, ranks, log), time.monotonic() + _PATIENCE
    latest = checkpoint_folder(run_dir) / "latest"
    try:
        while process.poll() is None and not latest.exists():
            if time.monotonic() > deadline:
                raise UserError(f"no checkpoint of step {steps} after {_PATIENCE:.0f} s: lower --steps; see {log}")
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.5))  # any moment, during a save too
        if process.poll() is not None:
            raise UserError(f"the run ended with exit code {process.returncode} before it could be killed: see {log}")
    finally:
        kill(process)


def _run(arguments: Sequence[Any], ranks: int, run_dir: Path) -> None:
    log = run_dir.with_suffix(".log")
    process = start(arguments, ranks, log)
    try:
        code = process.wait()
    finally:
        kill(process)  # where this process is interrupted
    if code != 0:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"the run ended with exit code {code}: {' '.join(last)}; see {log}")

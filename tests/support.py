"""The command line as a user calls it, for tests of whole runs."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
T = TypeVar("T")
MASK32 = 0xFFFFFFFF


def sctd(*arguments: Any, ranks: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`sctd ARGUMENTS` in a process of its own; with `ranks`, under the real deepspeed launcher."""
    command = [*(launcher("deepspeed", ranks) if ranks else [sys.executable, "-m"]), "sctd"]
    texts = [str(argument) for argument in arguments]
    return subprocess.run(
        [*command, *texts], capture_output=True, text=True, env=environment(), cwd=cwd or ROOT, timeout=600
    )


def launcher(name: str, ranks: int) -> list[str]:
    """The words that stand before a module's name, to start it so many times on this machine."""
    scripts, port = Path(sys.executable).parent, str(free_port())  # another job may hold the default port
    return {
        "deepspeed": [str(scripts / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port, "--module"],
        "torchrun": [str(scripts / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port, "-m"],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), sys.executable, "-m"],
    }[name]


def environment() -> dict[str, str]:
    """Of a process that runs this tree's code on one thread of a CPU."""
    scripts = Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'pipeline'}:{ROOT / 'kernels'}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def until(condition: Callable[[], T], what: str | Callable[[], str], seconds: float = 60) -> T:
    """What `condition` answers as soon as that is true of itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what if isinstance(what, str) else what()}: not within {seconds:g} s")


def train(recipe: Path, run_dir: Path, *arguments: Any, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """A pretraining run that must succeed."""
    done = sctd("pretrain", recipe, f"run.dir={run_dir}", *arguments, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fmix32(x: int) -> int:
    """MurmurHash3's finaliser in plain Python integers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & MASK32
    x ^= x >> 13
    x = x * 0xC2B2AE35 & MASK32
    return x ^ x >> 16


def tie_hash(seed: int, position: int) -> int:
    """The hash that orders ties: both halves of the row's seed mixed into the position."""
    return fmix32(fmix32(position + seed & MASK32) ^ (seed >> 32 & MASK32))


def accumulate(table: Any, labels: Any, losses: Any) -> None:
    """Hand given losses to an importance table, as the cross-entropy does with those it computes."""
    from sctd_kernels.cross_entropy import reference

    reference.accumulate(losses.flatten(), labels.flatten(), table.sum_count_2V)


def assert_same_run(a: Path, b: Path) -> None:
    """The same parameters, losses and data, bit for bit."""
    left, right = (load_file(run / "export" / "model.safetensors") for run in (a, b))
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)
    for key in ("step", "phase", "loss", "mlm_drop", "mlm_full", "kl_global", "kl_local", "lr", "samples", "ledger"):
        assert [record[key] for record in records(a)] == [record[key] for record in records(b)], key

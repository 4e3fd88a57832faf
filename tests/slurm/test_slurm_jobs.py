"""The job scripts on a real SLURM of two nodes: they train, and no interruption changes what comes out."""

import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import Slurm
from support import ROOT, assert_same_run, records, train, until

pytestmark = pytest.mark.slurm

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
# Two nodes with one task each instead of four with eight GPUs: the script's own knobs.
SHRUNK = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
STEPS = ("train.steps=250", "train.log_every=1", "train.precision=fp32", "train.zero_stage=1")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without SLURM and without interruptions."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(recipe, run_dir, *STEPS, ranks=2)
    return run_dir


def submit(slurm: Slurm, recipe: Path, folder: Path, save_every: int) -> str:
    """The number of a job that trains in `folder`/run and has come to its tenth step."""
    overrides = " ".join([*STEPS, f"train.save_every={save_every}"])
    job = slurm.run(
        "sbatch", "--parsable", f"--output={folder}/%x.log", *SHRUNK, "--signal=USR1@60",
        "slurm/pretrain_large.sh", RECIPE=recipe, RUN=folder / "run", ARGS=overrides, DEEPSPEED_CONFIG="",
    )  # fmt: skip
    metrics = folder / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and len(records(metrics.parent)) >= 10, lambda: f"tenth step; {log(folder)}", 120)
    return job


def log(folder: Path) -> str:
    path = folder / "bert-large-sctd.log"
    return path.read_text(encoding="utf-8") if path.exists() else "no log yet"


def by_signal(slurm: Slurm, job: str) -> None:
    slurm.run("scancel", "--signal=USR1", job)


def by_time_limit(slurm: Slurm, job: str) -> None:
    """SLURM looks at time limits twice a minute: until then the ranks pause. Before the signal it lets them go on."""
    ranks = tasks(job)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    hours, minutes, seconds = map(int, slurm.field(job, "RunTime").split(":"))
    limit = math.ceil((3600 * hours + 60 * minutes + seconds + 45) / 60)  # 45 to 105 s from now; the warning: 60 before
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    until(lambda: not any(map(paused, ranks)), lambda: f"a signal before the limit of {limit} minutes", 100)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # the second attempt would be warned at once, too


def paused(process: int) -> bool:
    try:
        return "State:\tT" in Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def by_requeue(slurm: Slurm, job: str) -> None:
    slurm.run("scontrol", "requeue", job)


def by_killed_task(slurm: Slurm, job: str) -> None:
    """A task of the second node is gone from one moment to the next, as with a broken node."""
    os.kill(tasks(job)[1], signal.SIGKILL)


def tasks(job: str) -> list[int]:
    """The processes that train in a job, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = dict(word.split(b"=", 1) for word in (process / "environ").read_bytes().split(b"\0") if b"=" in word)
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if said.get(b"SLURM_JOB_ID") == job.encode() and b"SLURM_PROCID" in said and b"pretrain" in command:
            found[int(said[b"SLURM_PROCID"])] = int(process.name)
    assert sorted(found) == [0, 1], found
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("interrupt", [by_signal, by_time_limit, by_requeue, by_killed_task])
def test_an_interrupted_job_ends_as_if_it_had_not_been(
    interrupt: Callable[[Slurm, str], None], slurm: Slurm, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    # Whoever is asked to stop saves by himself; who is killed has what was saved before.
    job = submit(slurm, recipe, tmp_path, save_every=5 if interrupt is by_killed_task else 0)
    interrupt(slurm, job)
    until(lambda: "attempt 2" in log(tmp_path), "a second attempt", 120)
    assert slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED") == "COMPLETED", log(tmp_path)
    said = log(tmp_path)
    assert "resuming" in said and "2 x cpu" in said
    assert_same_run(tmp_path / "run", whole)


def test_bad_input_is_not_tried_again(slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
    job = slurm.run(
        "sbatch", "--parsable", f"--output={tmp_path}/%x.log", *SHRUNK, "slurm/pretrain_base.sh",
        RECIPE=recipe, RUN=tmp_path / "run", ARGS="train.stepz=5", DEEPSPEED_CONFIG="",
    )  # fmt: skip
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    said = (tmp_path / "bert-base-sctd.log").read_text(encoding="utf-8")
    assert "did you mean 'steps'" in said and "attempt" not in said


def test_the_commands_of_the_readme(slurm: Slurm, recipe: Path, corpus: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^CORPUS=\S+ .*sbatch .*$", text, flags=re.MULTILINE)
    assert len(commands) == 2
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for command in commands:
        command = re.sub(r"CORPUS=\S+", f"CORPUS={corpus} RECIPE={recipe} DEEPSPEED_CONFIG=", command)
        command = command.replace(" slurm/", f" --parsable {' '.join(SHRUNK)} --time=30 slurm/")
        job = slurm.run("bash", "-c", command, cwd=tmp_path)
        assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", list(tmp_path.glob("*.log"))[0].read_text()
    for name, arm in (("bert-large-sctd", "sctd"), ("large-token-drop", "token_drop")):
        assert len(records(tmp_path / "runs" / name)) == 10
        assert f"arm       {arm}" in (tmp_path / f"{name}.log").read_text(encoding="utf-8")

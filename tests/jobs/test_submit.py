"""Batch scripts that `sctd slurm` writes; that they run is tested on a real SLURM."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sctd.config import config_from_dict, merge_dicts, to_dict, to_yaml
from sctd.errors import UserError
from sctd.train.keep.export import read_run
from sctd.train.submit import limit_seconds
from support import sctd, train

CPUS = ("--nodes", 2, "--gpus-per-node", 0, "--dry-run")


def test_a_dry_run_writes_and_prints_a_clean_script(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "my run at 50%"
    done = sctd("slurm", recipe, f"run.dir={run_dir}", "run.examples=['a [MASK]']", *CPUS)
    assert done.returncode == 2 and "more than one word" in done.stderr and not run_dir.exists()
    wanted = ("train.steps=7", "--time", "1-12:00:00", "--cpus-per-task", 3)
    done = sctd("slurm", recipe, f"run.dir={run_dir}", *wanted, *CPUS)
    assert done.returncode == 0, done.stderr
    script = (run_dir / "job.sh").read_text(encoding="utf-8")
    assert script in done.stdout and "sbatch" in done.stdout
    asked = ["--job-name='my run at 50%'", f"--output='{run_dir}%/job.log'", "--cpus-per-task=3", "--signal=USR1@600"]
    for line in [*asked, "--nodes=2", "--ntasks-per-node=1", "--time=1-12:00:00"]:
        assert f"#SBATCH {line}\n" in script
    assert "gpus" not in script and "ARGS=train.steps=7\n" in script and f"RUN='{run_dir}'\n" in script
    subprocess.run(["bash", "-n", run_dir / "job.sh"], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", run_dir / "job.sh"], check=True, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def stopped(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at step 2."""
    run_dir = tmp_path_factory.mktemp("submit") / "stopped"
    train(recipe, run_dir, "train.stop_at=2", "train.valid_rows=2")
    return run_dir


def test_a_branch_is_submitted_and_checked(stopped: Path, tmp_path: Path) -> None:
    parent, run_dir = tmp_path / "parent", tmp_path / "run"
    shutil.copytree(stopped, parent)
    words = ("--branch-from", parent, f"run.dir={run_dir}")
    done = sctd("slurm", *words, "model.layers=6", *CPUS)
    assert done.returncode == 2 and "model.layers is 6" in done.stderr and not run_dir.exists()
    done = sctd("slurm", *words, "optimizer.lr=1e-4", *CPUS)
    assert done.returncode == 0, done.stderr
    script = (run_dir / "job.sh").read_text(encoding="utf-8")
    assert f"RECIPE=''\nBRANCH_FROM={parent}\n" in script and "ARGS=optimizer.lr=1e-4\n" in script
    # Once it has a checkpoint of its own, its parent may go.
    _begin(run_dir, parent, {"run": {"branch_from": f"{parent}@2"}, "optimizer": {"lr": 1e-4}})
    parent.rename(tmp_path / "gone")
    done = sctd("slurm", *words, *CPUS)
    assert done.returncode == 0, done.stderr
    assert str(parent) in done.stdout


def test_a_source_is_named_with_its_full_path(recipe: Path, stopped: Path, tmp_path: Path) -> None:
    """The job runs in another folder; a run that has begun keeps the name that it has, though the source is gone."""
    source, run_dir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(stopped, source)

    def script() -> str:
        done = sctd("slurm", recipe, "run.dir=run", "init.from=source@2", *CPUS, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"ARGS=init.from={source}@2\n" in script()
    _begin(run_dir, stopped, {"init": {"from": "source@2"}, "objective": {"importance_warmup": 0}})
    source.rename(tmp_path / "gone")
    assert "ARGS=init.from=source@2\n" in script()


def _begin(run_dir: Path, other: Path, change: dict[str, Any]) -> None:
    """Let a run stand there as the other one does, with other settings."""
    shutil.copytree(other, run_dir, dirs_exist_ok=True)
    config = merge_dicts(to_dict(read_run(other)), change)
    (run_dir / "config.yaml").write_text(to_yaml(config_from_dict(config)), encoding="utf-8")


def test_gpus_are_asked_for(recipe: Path, tmp_path: Path) -> None:
    arguments = ("--nodes", 4, "--gpus-per-node", 2, "--dry-run", "--time", 30)
    done = sctd("slurm", recipe, f"run.dir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 0, done.stderr
    for line in ("--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=30"):
        assert f"#SBATCH {line}\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", 0], "argument --nodes: '0' is not a whole number of at least 1"),
        (["--nodes", 1, "--gpus-per-node", -1], "--gpus-per-node is -1"),
        (["--nodes", 1, "--time", "soon"], "--time is 'soon'"),
        (["--nodes", 3, "--gpus-per-node", 1], "batch sizes do not multiply out"),
        (["--nodes", 1, "--gpus-per-node", 1, "train.stepz=3"], "did you mean 'steps'"),
        (["--nodes", 1, "--gpus-per-node", 1, "data.corpus=/nowhere"], "/nowhere"),
        (["--nodes", 1, "--gpus-per-node", 1, "model.max_positions=8"], "model.max_positions is 8"),
        (["--nodes", 1, "--gpus-per-node", 1, "run.dir=/proc/run"], "/proc/run"),
        (["--nodes", 1, "--gpus-per-node", 1, "--deepspeed_config", "no.json"], "no.json"),
    ],
)
def test_what_the_job_would_refuse_is_refused_now(
    recipe: Path, tmp_path: Path, arguments: list[str | int], words: str
) -> None:
    done = sctd("slurm", recipe, f"run.dir={tmp_path / 'run'}", "--dry-run", *arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("2:30", 150), ("1:00:00", 3600), ("1-2", 93600), ("1-2:03", 93780), ("1-02:03:04", 93784)],
)
def test_times_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0:30", "1h", "1:2:3:4", "-5", "24:00:00 ", "٣٠"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        limit_seconds(text)

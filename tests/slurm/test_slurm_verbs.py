"""`sctd slurm`, `sctd status` and `sctd doctor` on a real SLURM of two nodes."""

from pathlib import Path

import pytest

from cluster import Slurm
from support import records, until

pytestmark = pytest.mark.slurm


def test_a_submitted_recipe_trains_on_two_nodes(slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"run.dir={run_dir}", "train.precision=fp32", "train.zero_stage=1", "train.steps=6"]
    said = slurm.run("sctd", "slurm", recipe, *overrides, "--nodes", 2, "--gpus-per-node", 0, "--time", 10)
    job = said.split("submitted as job ")[1].split(",")[0]
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", (run_dir / "job.log").read_text(encoding="utf-8")
    assert len(records(run_dir)) == 6 and "2 x cpu" in (run_dir / "job.log").read_text(encoding="utf-8")
    status = slurm.run("sctd", "status", run_dir)
    assert "step 6 of 6" in status and f"job {job}, restart 0, 2 ranks" in status and "done" in status
    assert f"queue        job {job}" in status
    _a_branch_is_requeued(slurm, run_dir, tmp_path / "branch")


def _a_branch_is_requeued(slurm: Slurm, parent: Path, run_dir: Path) -> None:
    words = (f"run.dir={run_dir}", "train.steps=120", "train.save_every=5", "train.log_every=1")
    options = ("--nodes", 2, "--gpus-per-node", 0, "--time", 10)
    said = slurm.run("sctd", "slurm", "--branch-from", f"{parent}@6", *words, *options)
    job = said.split("submitted as job ")[1].split(",")[0]
    until(lambda: (run_dir / "metrics.jsonl").exists() and len(records(run_dir)) >= 20, "step 20", 120)
    slurm.run("scontrol", "requeue", job)
    log = run_dir / "job.log"
    until(lambda: "attempt 2" in log.read_text(encoding="utf-8"), "a second attempt", 120)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text(encoding="utf-8")
    text = log.read_text(encoding="utf-8")
    assert text.count("branched from") == 1 and text.count("resuming") == 2, text
    assert [record["step"] for record in records(run_dir)] == list(range(1, 121))


def test_doctor_under_srun(slurm: Slurm, tmp_path: Path) -> None:
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=5", "sctd", "doctor", tmp_path]
    said = slurm.run(*command)
    assert "2 ranks, gloo: each received from the one before it" in said and "ready: 0 failures" in said
    assert "time limit" in said

"""`sctd ablate --nodes` on a real SLURM: each run is submitted once, however often it is called."""

import os
from pathlib import Path

import pytest

from cluster import Slurm

pytestmark = pytest.mark.slurm


def test_runs_are_submitted_once(slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sctd", "ablate", "selection", recipe, "--out", out, "--nodes", 1, "--gpus-per-node", 0, "--time", 10]
    slurm.run("scontrol", "update", "PartitionName=all", "State=DOWN")  # so that the jobs wait
    try:
        first = slurm.run(*command)
        jobs = [line.split("job ")[1].split(",")[0] for line in first.splitlines() if line.startswith("submitted")]
        assert len(set(jobs)) == 4 and first.splitlines()[-1].split()[:4] == ["random-LTD", "0", "of", "10"]
        slurm.run("scancel", jobs[3])
        again = slurm.run(*command)
        for label, job in zip(("baseline", "importance", "random"), jobs, strict=False):
            assert f"{label}: in the queue already, as job {job}" in again
        assert again.count("submitted as job") == 1 and "random-ltd/job.log" in again
    finally:
        slurm.run("scancel", "--user", os.getuid())
        slurm.run("scontrol", "update", "PartitionName=all", "State=UP")

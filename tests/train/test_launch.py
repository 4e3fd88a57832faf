"""Who am I among how many: what each launcher says, and real ones that all start the same run."""

import shutil
from pathlib import Path

import pytest

from sctd.errors import UserError
from sctd.train.engine.launch import Launch, discover
from support import launched, records

SLURM = {
    "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "28", "SLURM_STEP_TASKS_PER_NODE": "8(x3),4",
    "SLURM_PROCID": "25", "SLURM_LOCALID": "1", "SLURM_NODEID": "3", "MASTER_ADDR": "gpu07",
}  # fmt: skip
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5",
}  # fmt: skip


def test_what_slurm_says() -> None:
    found = discover(SLURM)
    assert found == Launch("slurm", 25, 28, 1, 4, "gpu07", found.port)
    assert 20000 <= found.port < 40000
    assert discover(SLURM | {"SLURM_STEP_ID": "3"}).port != found.port
    assert discover(SLURM | {"MASTER_PORT": "4711"}).port == 4711
    assert discover(SLURM | {"SLURM_NODEID": "0"}).local_size == 8


def test_what_torchrun_and_deepspeed_say() -> None:
    assert discover(TORCHRUN) == Launch("environment", 3, 4, 1, 2, "a", 5)
    assert discover(SLURM | TORCHRUN).launcher == "environment"  # torchrun under srun
    deepspeed = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert discover(deepspeed | {"LOCAL_SIZE": "2"}).local_size == 2


def test_a_process_that_nobody_launched() -> None:
    for env in ({}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        assert discover(env).launcher == "none" and discover(env).size == 1


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"RANK": "first"}, "RANK is 'first'"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "rank 3 of 0"),
        (TORCHRUN | {"WORLD_SIZE": "3"}, "rank 3 of 3"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x"}, "SLURM_STEP_TASKS_PER_NODE is '8"),
        ({name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}, "SLURM_PROCID is ''"),
        ({name: value for name, value in SLURM.items() if name != "MASTER_ADDR"}, "set MASTER_ADDR"),
    ],
)
def test_a_launcher_that_says_half(env: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # and no scontrol
    with pytest.raises(UserError, match=words):
        discover(env)


@pytest.fixture(scope="module")
def by_deepspeed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("launch") / "run"
    done = launched("deepspeed", 2, "pretrain", recipe, f"run.dir={run_dir}", "train.steps=5")
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


@pytest.mark.parametrize("name", ["torchrun", "mpirun"])
def test_every_launcher_starts_the_same_run(name: str, recipe: Path, by_deepspeed: Path, tmp_path: Path) -> None:
    if name == "mpirun":
        pytest.importorskip("mpi4py")
        if shutil.which("mpirun") is None:
            pytest.skip("mpirun is not installed")
    done = launched(name, 2, "pretrain", recipe, f"run.dir={tmp_path}", "train.steps=5")
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    for key in ("loss", "ledger"):
        assert [record[key] for record in records(tmp_path)] == [record[key] for record in records(by_deepspeed)]

"""`sctd doctor` alone, on two ranks, and where something is wrong."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sctd.train.slurm import seconds_of
from support import environment, free_port, sctd

SHORT = (
    "import sys, sctd.jobs.doctor as doctor; doctor._PATIENCE = 4.0; sys.exit(not doctor.doctor(doctor.Path('runs')))"
)


def test_one_process(tmp_path: Path) -> None:
    done = sctd("doctor", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "torch 2",
        "deepspeed 0",
        "triton",
        "mpi4py",
        "apex",
        "GB free",
        "MB/s",
        "kernels",
        "ready: 0 failures",
    ):
        assert words in done.stdout, words
    assert not list(tmp_path.iterdir())


def test_two_ranks_hear_each_other(tmp_path: Path) -> None:
    done = sctd("doctor", tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks, gloo: each received from the one before it" in done.stdout
    assert "64 MB in" in done.stdout and "clocks" in done.stdout
    assert "is the same on all ranks" in done.stdout and not list(tmp_path.iterdir())
    assert done.stdout.count("ready: ") == 1 and done.stdout.count("versions ") == 1


def test_a_rank_with_other_versions_is_named(tmp_path: Path) -> None:
    """Rank 1 finds another numpy's metadata first, as on a node with an environment of its own."""
    other = tmp_path / "other" / "numpy-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    processes = []
    port = str(free_port())
    for rank in range(2):
        env = environment() | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if rank == 1:
            env["PYTHONPATH"] = f"{tmp_path / 'other'}:{env['PYTHONPATH']}"
        command = [sys.executable, "-m", "sctd", "doctor", str(tmp_path)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    (line,) = [line for line in said[0].splitlines() if line.startswith("FAIL")]
    assert "rank 1 on" in line and "numpy 0.0.1" in line and "NOT READY: 1 failures" in said[0]


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    env = environment() | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run([sys.executable, "-c", SHORT], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL  ranks          missing after 4 s: rank 1 of 2; present: rank 0, on" in done.stdout


def test_ranks_that_see_different_folders_under_one_name(tmp_path: Path) -> None:
    """As where each node has a local disk mounted at the same place."""
    processes, port = [], str(free_port())
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        env = environment() | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code = SHORT.replace("_PATIENCE = 4.0", "_SETTLES = 0.5")
        command = [sys.executable, "-c", code]
        processes.append(
            subprocess.Popen(command, env=env, cwd=tmp_path / str(rank), stdout=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert "FAIL  folder         runs on" in said[0] and "choose one that all nodes share" in said[0]


def test_a_folder_on_a_full_disk_still_gets_its_table(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    done = sctd("doctor", small_disk)
    assert done.returncode == 1 and "cannot be written" in done.stdout and "NOT READY" in done.stdout


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = sctd("doctor", tmp_path / "file" / "runs")
    assert done.returncode == 1 and "is not a writable folder" in done.stdout and "NOT READY" in done.stdout


def test_kernels_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCTD_KERNELS", "cuda")
    done = sctd("doctor", tmp_path)
    assert done.returncode == 1 and "FAIL  kernels" in done.stdout


@pytest.mark.parametrize(
    ("text", "seconds"), [("10:00", 600), ("1-00:00:30", 86430), ("2:00:00", 7200), ("UNLIMITED", None)]
)
def test_time_left_as_squeue_says_it(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds

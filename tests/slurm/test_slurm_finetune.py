"""The array of fine-tunings on a real SLURM of two nodes: one cell a job, and only what is missing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster import Slurm
from sctd.cli import main
from support import sctd, until
from tiny_bert import tiny_bert, write_rte, write_stsb

pytestmark = pytest.mark.slurm

# One CPU a job: the script's own knobs.
SHRUNK = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
ARGS = "--seeds 2 --steps 6 --lr 1e-3 --batch-size 8"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stsb(write_rte(tmp_path_factory.mktemp("data"), 32, 16), 32, 16)


def submit(slurm: Slurm, folder: Path, checkpoint: Path, data: Path, array: str, tasks: str = "rte stsb") -> str:
    """The states that the jobs of the array ended in, in the order of their numbers."""
    job = slurm.run(
        "sbatch", "--parsable", f"--array={array}", f"--output={folder}/%x-%a.log", *SHRUNK, "slurm/finetune_array.sh",
        CHECKPOINT=checkpoint, TASKS=tasks, DATA=data, OUT=folder / "out", ARGS=ARGS,
    )  # fmt: skip

    def ended() -> list[str]:
        shown = slurm.run("scontrol", "show", "job", job)
        found = {}
        for text in shown.split("\n\n"):
            fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
            found[int(fields["ArrayTaskId"].split("-")[0])] = fields["JobState"]
        states = [found[number] for number in sorted(found)]
        return states if all(state in ("COMPLETED", "FAILED") for state in states) else []

    return " ".join(until(ended, lambda: f"the end of array {job}: {logs(folder)}", 240))


def logs(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.log")))


def results(folder: Path) -> dict[str, Any]:
    found = sorted((folder / "out").glob("finetune/*/*/result.json"))
    return {f"{path.parts[-3]}/{path.parts[-2]}": json.loads(path.read_text()) for path in found}


def test_an_array_runs_all_cells_and_again_what_is_missing(
    slurm: Slurm, checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["--task", "rte", "--task", "stsb", "--data-dir", str(data), *ARGS.split()]
    command = ["finetune", str(checkpoint), *tasks, "--out"]
    assert main([*command, str(tmp_path / "out"), "--count"]) == 0
    assert capsys.readouterr().out == "4\n"
    assert submit(slurm, tmp_path, checkpoint, data, "0-3") == "COMPLETED COMPLETED COMPLETED COMPLETED", logs(tmp_path)
    first = results(tmp_path)
    assert len(first) == 4

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("finetune/*/*/result.json")}
    gone = "stsb/lr0.001-b8-seed1-6steps"
    shutil.rmtree(tmp_path / "out" / "finetune" / gone)
    assert submit(slurm, tmp_path, checkpoint, data, "0-3%2") == "COMPLETED COMPLETED COMPLETED COMPLETED"
    assert logs(tmp_path).count("are finished already") == 3
    again = results(tmp_path)
    assert again.keys() == first.keys() and again[gone]["curve"] == first[gone]["curve"]
    assert sum(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()) == 3

    assert main([*command, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 fine-tunings are finished already" in said and "rte   accuracy" in said
    # In a process of its own: MKL's order of adding is fixed before a process multiplies for the first time.
    assert sctd(*command, tmp_path / "alone").returncode == 0
    alone = [json.loads(path.read_text()) for path in sorted((tmp_path / "alone").glob("finetune/*/*/result.json"))]
    assert [result["curve"] for result in alone] == [result["curve"] for result in again.values()]


def test_bad_input_ends_a_job_with_one_line(slurm: Slurm, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    assert submit(slurm, tmp_path, checkpoint, data, "4-4") == "FAILED"
    assert "--cell 4: there are 4, from 0 to 3" in logs(tmp_path) and "Traceback" not in logs(tmp_path)
    assert submit(slurm, tmp_path, checkpoint, data, "0-0", tasks="rtf") == "FAILED"
    assert "did you mean 'rte'" in logs(tmp_path) and not results(tmp_path)

"""The job script of the preparation on a real SLURM of two nodes, its ranks joined through PMIx."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from cluster import Slurm
from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.settings import CorpusSettings
from support import until
from texts import assert_same_corpus, documents, write

pytestmark = pytest.mark.slurm

# Two nodes with one task each: the script's own knobs.
SHRUNK = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10"]
OPTIONS = "--seq-len 16,64 --valid-fraction 0.1 --shard-plan 20kB"


@pytest.fixture(scope="module")
def source(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> str:
    if "pmix" not in slurm.run("srun", "--mpi=list"):
        pytest.skip("this SLURM has no PMIx plugin")
    pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
    folder = tmp_path_factory.mktemp("source")
    for number in range(3):
        write(folder / f"{number}.jsonl", documents(200, seed=number))
    return f"{folder}/*.jsonl"


@pytest.fixture(scope="module")
def alone(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without SLURM; its tokenizer serves both."""
    folder = tmp_path_factory.mktemp("alone")
    wanted = CorpusSettings((source,), (16, 64), vocab_size=320, valid_fraction=0.1, shard_plan=20_000)
    prepare(wanted, folder / "first", log=lambda line: None)
    wanted = CorpusSettings((source,), (16, 64), str(folder / "first"), valid_fraction=0.1, shard_plan=20_000)
    prepare(wanted, folder / "corpus", log=lambda line: None)
    return folder


def submit(slurm: Slurm, source: str, alone: Path, folder: Path) -> str:
    return slurm.run(
        "sbatch", "--parsable", f"--output={folder}/%x.log", *SHRUNK, "slurm/prepare_corpus.sh",
        SOURCES=source, OUT=folder / "corpus", TOKENIZER=alone / "first", ARGS=OPTIONS,
    )  # fmt: skip


def log(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.log"))


def test_two_nodes_prepare_one_corpus(slurm: Slurm, source: str, alone: Path, tmp_path: Path) -> None:
    job = submit(slurm, source, alone, tmp_path)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log(tmp_path)
    assert_same_corpus(alone / "corpus", tmp_path / "corpus")
    facts = json.loads((tmp_path / "corpus" / "report.json").read_text())
    assert len(facts["ranks"]) == 2, log(tmp_path)


def test_a_dead_rank_ends_the_job_and_the_next_continues(
    slurm: Slurm, source: str, alone: Path, tmp_path: Path
) -> None:
    job = submit(slurm, source, alone, tmp_path)
    pieces = tmp_path / ".corpus.work" / "pieces"
    until(lambda: list(pieces.glob("*.json")), lambda: f"a piece; {log(tmp_path)}", 120)
    ranks = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("SLURM_JOB_ID") == job]
    rank = next(p for p in ranks if "prepare" in p.cmdline() and p.environ().get("SLURM_PROCID") == "1")
    os.kill(rank.pid, signal.SIGKILL)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED", log(tmp_path)
    assert "task 1" in log(tmp_path) and not (tmp_path / "corpus").exists()
    kept = len(list(pieces.glob("*.json")))
    again = submit(slurm, source, alone, tmp_path)
    assert slurm.wait(again, "COMPLETED", "FAILED") == "COMPLETED", log(tmp_path)
    assert f"continuing: {kept} of " in log(tmp_path)
    assert_same_corpus(alone / "corpus", tmp_path / "corpus")


def test_bad_input_ends_the_job_with_one_line(slurm: Slurm, alone: Path, tmp_path: Path) -> None:
    job = submit(slurm, str(tmp_path / "none-*.jsonl"), alone, tmp_path)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED", log(tmp_path)
    assert slurm.field(job, "ExitCode") == "2:0"
    assert "no file matches" in log(tmp_path) and "Traceback" not in log(tmp_path)

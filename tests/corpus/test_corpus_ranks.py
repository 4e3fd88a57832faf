"""Preparation on many ranks: real MPI and real processes, the same corpus, and clear words when one of them dies."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sctd.corpus.manifest import read_manifest
from sctd.corpus.prepare import team as module
from sctd.corpus.prepare.prepare import prepare
from sctd.corpus.prepare.settings import CorpusSettings
from sctd.corpus.prepare.team import Rank, Team, Workers, left_behind, team
from sctd.errors import RunError, UserError
from support import ROOT, environment, launcher, until
from texts import Note, assert_same_corpus, documents, write

PLAN = "20kB"
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources of 130 kB in five files, one of them compressed, with copies across them."""
    folder = tmp_path_factory.mktemp("sources")
    for number, count in enumerate((300, 10, 150)):
        write(folder / f"wiki-{number}.jsonl", documents(count, seed=number))
    subprocess.run(["gzip", folder / "wiki-2.jsonl"], check=True)
    write(folder / "books-0.jsonl", [*documents(100, seed=7), *documents(40)])
    (folder / "books-1.txt").write_text("\n\n".join(documents(60, seed=8)))
    return [f"wiki={folder}/wiki-*", f"books={folder}/books-*"]


@pytest.fixture(scope="module")
def vocabulary(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vocabulary") / "corpus"
    prepare(CorpusSettings(tuple(sources), (16,), vocab_size=320, valid_fraction=0.1), out, log=lambda line: None)
    return out


def arguments(sources: list[str], vocabulary: Path, out: Path, *more: str) -> list[str]:
    named = [word for source in sources for word in ("--source", source)]
    sizes = ["--seq-len", "16,64", "--valid-fraction", "0.1", "--shard-plan", PLAN]
    return ["prepare", *named, "--tokenizer", str(vocabulary), *sizes, "--out", str(out), *more]


def sctd(ranks: int, words: list[str], **variables: str) -> "subprocess.CompletedProcess[str]":
    """`sctd` under mpirun, or plainly for 0 ranks."""
    command = [*(launcher("mpirun", ranks) if ranks else [sys.executable, "-m"]), "sctd", *words]
    return subprocess.run(command, env=environment() | variables, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(sources: list[str], vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "corpus"
    done = sctd(0, arguments(sources, vocabulary, out))
    assert done.returncode == 0, done.stderr
    return out


@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mpi_ranks_make_the_same_corpus(
    sources: list[str], vocabulary: Path, alone: Path, tmp_path: Path, ranks: int
) -> None:
    out = tmp_path / "corpus"
    done = sctd(ranks, arguments(sources, vocabulary, out))
    assert done.returncode == 0, done.stderr
    assert read_manifest(out) == read_manifest(alone)
    assert_same_corpus(alone, out)
    assert done.stdout.count("unigram entropy") == 1, "all ranks say what one should"
    facts = json.loads((out / "report.json").read_text())
    assert len(facts["ranks"]) == ranks and sum(rank["pieces"] for rank in facts["ranks"]) > 6


def test_workers_make_the_same_corpus(sources: list[str], vocabulary: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    done = sctd(0, arguments(sources, vocabulary, out, "--workers", "3"))
    assert done.returncode == 0, done.stderr
    assert_same_corpus(alone, out)
    assert {rank["name"] for rank in json.loads((out / "report.json").read_text())["ranks"]} <= {"0", "1", "2"}


@needs_mpi
def test_bad_data_ends_all_ranks_with_one_line(sources: list[str], vocabulary: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"title": "no text"}\n')
    done = sctd(2, arguments([*sources, f"bad={bad}"], vocabulary, tmp_path / "corpus"))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sctd: error")]
    assert "bad.jsonl, line 2: no key 'text'" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "corpus").exists()
    bad.write_text('{"text": "fine"}\n{"text": "mended"}\n')
    done = sctd(2, arguments([*sources, f"bad={bad}"], vocabulary, tmp_path / "corpus"))
    assert done.returncode == 0 and "continuing: " in done.stdout


@needs_mpi
def test_ranks_of_other_versions_are_refused(sources: list[str], vocabulary: Path, tmp_path: Path) -> None:
    """Rank 1 runs a copy of this code whose version was changed."""
    shutil.copytree(ROOT / "pipeline", tmp_path / "other", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    init = tmp_path / "other" / "sctd" / "__init__.py"
    init.write_text(init.read_text() + '\n__version__ = "0.0.1"\n')
    words = [sys.executable, "-m", "sctd", *arguments(sources, vocabulary, tmp_path / "corpus")]
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "1", *words, ":", "-n", "1", "-x",
               f"PYTHONPATH={tmp_path / 'other'}:{ROOT / 'kernels'}", *words]  # fmt: skip
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "has sctd 0.0.1" in done.stderr and "same installation" in done.stderr


@needs_mpi
def test_a_killed_job_is_continued_by_another_number_of_ranks(
    sources: list[str], vocabulary: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "corpus"
    words = arguments(sources, vocabulary, out)
    command = [*launcher("mpirun", 2), "sctd", *words]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log)
    finished = tmp_path / ".corpus.work" / "pieces"
    until(lambda: len(list(finished.glob("*.json"))) >= 2, "two pieces")
    for child in psutil.Process(process.pid).children(recursive=True):
        if "sctd" in child.cmdline():
            child.send_signal(signal.SIGKILL)
            break
    assert process.wait(60) != 0
    assert "rank" in (tmp_path / "log").read_text(), "nobody says who died"
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.json")}
    done = sctd(3, words)
    assert done.returncode == 0, done.stderr
    assert f"continuing: {len(before)} of " in done.stdout
    assert_same_corpus(alone, out)


def test_a_killed_worker_is_named_with_its_file(
    sources: list[str], vocabulary: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "corpus"
    words = arguments(sources, vocabulary, out, "--workers", "2")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sctd", *words], env=environment(), cwd=ROOT, stdout=log, stderr=log
        )
    claims = tmp_path / ".corpus.work" / "claims" / "encode"
    until(lambda: {"0", "1"} <= set(left_behind(claims).values()), "a claim of each worker")
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    first = min(workers, key=lambda worker: worker.pid)

    def stands_at_a_piece() -> bool:
        """Worker 0 is stopped with a piece in its hands; else it goes on."""
        first.suspend()
        if "0" not in left_behind(claims).values():
            first.resume()
            return False
        return True

    until(stands_at_a_piece, "a claim of worker 0")
    first.kill()
    assert process.wait(60) == 74
    said = (tmp_path / "log").read_text()
    assert "was killed by SIGKILL at " in said and "start again to continue" in said
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in workers)
    done = sctd(0, words)
    assert done.returncode == 0 and "continuing" in done.stdout
    assert_same_corpus(alone, out)


def test_ctrl_c_ends_workers_as_soon_as_they_are_there(sources: list[str], vocabulary: Path, tmp_path: Path) -> None:
    words = arguments(sources, vocabulary, tmp_path / "corpus", "--workers", "2")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sctd", *words],
            env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    children = lambda: psutil.Process(process.pid).children()  # noqa: E731
    until(lambda: len([each for each in children() if "spawn_main" in " ".join(each.cmdline())]) == 2, "two workers")
    workers = children()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(20) == 130
    said = (tmp_path / "log").read_text()
    assert said.endswith("sctd: interrupted (SIGINT); what is finished is kept: start again to continue\n"), said
    assert "Traceback" not in said
    psutil.wait_procs(workers, 5)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in workers)


# ---- the team by itself


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_item_is_done_once(tmp_path: Path, size: int) -> None:
    lines: list[str] = []
    found = Team(lines.append) if size == 1 else Workers(size, lines.append)
    (tmp_path / "done").mkdir()
    found.each(range(20), Note(tmp_path / "done"), tmp_path / "claims")
    assert len(list((tmp_path / "done").iterdir())) == 20
    assert sorted(lines) == sorted(f"did {item}" for item in range(20))


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("user", UserError, "^bad item$"),
        ("disk", UserError, r"item 3: x.npy No space left on device: .* finished work is kept"),
        ("bug", RunError, "rank [01] failed at item 3: ZeroDivisionError: oh"),
        ("kill", RunError, "worker [01] was killed by SIGKILL at item 3"),
    ],
)
def test_a_failure_of_a_worker_ends_them_all(tmp_path: Path, how: str, kind: type, said: str) -> None:
    (tmp_path / "done").mkdir()
    with pytest.raises(kind, match=said):
        Workers(2, lambda line: None).each(range(8), Note(tmp_path / "done", 3, how), tmp_path / "claims")


def test_a_full_disk_is_told_by_a_pipe(small_disk: Path, tmp_path: Path) -> None:
    """There is no room even for the claims, nor for word of it."""
    (tmp_path / "done").mkdir()
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as file:
        file.write(bytes(1 << 24))
    for number, found in enumerate((Team(print), Workers(2, print))):
        with pytest.raises(UserError, match="item 0:.* No space left on device"):
            found.each(range(8), Note(tmp_path / "done"), small_disk / str(number))


def test_others_stop_when_one_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GLANCE", 0.0)
    (tmp_path / "done").mkdir()
    with pytest.raises(UserError):
        Team(print).each(range(8), Note(tmp_path / "done", 2), tmp_path / "claims")
    with pytest.raises(module._Abandoned):
        Rank("1", tmp_path / "claims", print).work(range(8), Note(tmp_path / "done"))
    assert sorted(path.name for path in (tmp_path / "done").iterdir()) == ["0", "1"]


def test_workers_under_mpi_and_strangers_are_refused() -> None:
    with pytest.raises(UserError, match="several ranks already"):
        team(2, {"OMPI_COMM_WORLD_SIZE": "4"})
    with pytest.raises(UserError, match="2 tasks were started that do not know each other"):
        team(None, {"SLURM_STEP_NUM_TASKS": "2"})
    assert team(None, {}).size == 1 and team(3, {}).size == 3

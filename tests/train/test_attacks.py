"""What happens to runs on other people's machines: signals at bad moments, full disks, clocks that jump."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sctd.jobs.verify import kill, start
from sctd.train.keep.checkpoint import newest_whole
from support import assert_same_run, environment, records, sctd, start_ranks, train, until

STEPS = ("train.steps=30", "train.valid_every=5", "train.save_every=5")
SAVES = ("train.steps=12", "train.save_every=2", "train.keep_checkpoints=5")

# A run that takes its time in one place, and says in a file of each rank when it is there.
SLOW = """
import os, sys, time
from pathlib import Path
import sctd.train.keep.checkpoint as checkpoint
import sctd.train.loop.validation as validate
from sctd.cli import main
from sctd.data.stream import TrainStream
place, folder = sys.argv[1], Path(sys.argv[2])
def dawdle():
    (folder / f"{place}-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(0.3)
step, write, batches, calls = TrainStream.step, checkpoint._write_rank, validate.valid_batches, []
def slow_step(self, cursor, number):
    calls.append(cursor)
    if len(calls) > 3:
        dawdle()
    return step(self, cursor, number)
def slow_write(*args):
    dawdle()
    return write(*args)
def slow_batches(*args):
    for batch in batches(*args):
        dawdle()
        yield batch
if place == "batch":
    TrainStream.step = slow_step
elif place == "saving":
    checkpoint._write_rank = slow_write
else:
    validate.valid_batches = slow_batches
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("attacks") / "whole"
    train(recipe, run_dir, *STEPS, ranks=2)
    return run_dir


@pytest.mark.parametrize("place", ["batch", "saving", "validation"])
def test_sigterm_to_one_rank_of_two(place: str, recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Wherever it hits, both ranks save and stop, and the run ends as if nothing had been."""
    script, run_dir = tmp_path / "slow.py", tmp_path / "run"
    script.write_text(SLOW, encoding="utf-8")
    words = (place, tmp_path, "pretrain", recipe, f"run.dir={run_dir}", *STEPS)
    children = start_ranks(*words, ranks=2, program=script, merged=True)
    ended = lambda: any(each.poll() is not None for each in children)  # noqa: E731
    marker = tmp_path / f"{place}-1"
    until(lambda: ended() or marker.exists() and marker.read_text(), f"rank 1 in {place}", 120)
    assert not ended(), children[0].output
    children[1].terminate()
    said = [each.communicate(timeout=120)[0] for each in children]
    assert "continue with --resume" in said[0], said
    stopped = records(run_dir)[-1]["step"]
    assert stopped < 30
    assert newest_whole(run_dir) == run_dir / "checkpoints" / f"step-{stopped:08d}"
    train(recipe, run_dir, *STEPS, "--resume", ranks=2)
    assert_same_run(run_dir, whole)


def test_sigkill_at_moments_of_chance(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks of a run that saves at every step, five times; `benchmarks/reliability.py attacks` does it longer."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    run_dir, chance, steps = tmp_path / "run", random.Random(), ("train.steps=150", "train.save_every=1")
    arguments = [recipe, f"run.dir={run_dir}", *steps]
    for number in range(5):
        have = len(records(run_dir)) if number else 0
        process = start([*arguments, *(["--resume"] if number else [])], 2, tmp_path / "log.txt")
        until(lambda have=have, process=process: process.poll() is not None or has_trained(run_dir, have + 1), "a step")
        time.sleep(chance.uniform(0, 0.2))
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        kill(process)
    train(recipe, run_dir, *steps, "--resume", ranks=2)
    train(recipe, tmp_path / "whole", "train.steps=150", ranks=2)
    assert_same_run(run_dir, tmp_path / "whole")


@pytest.fixture(scope="module")
def saved(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs on the small disk should have come to."""
    run_dir = tmp_path_factory.mktemp("attacks") / "saved"
    train(recipe, run_dir, *SAVES)
    return run_dir


@pytest.mark.parametrize(("seen", "behind"), [(True, "true"), (False, "true"), (False, "false")])
def test_a_full_disk(seen: bool, behind: str, recipe: Path, saved: Path, small_disk: Path) -> None:
    """Found before writing, or, where the disk fills meanwhile, while writing: what was saved stays whole."""
    run_dir = small_disk / "run"
    arguments = ["pretrain", str(recipe), f"run.dir={run_dir}", *SAVES, f"train.async_save={behind}"]
    blind = "import sys, shutil; from types import SimpleNamespace as S; from sctd.cli import main\n"
    blind += "" if seen else "shutil.disk_usage = lambda path: S(free=1e12)\n"
    command = [sys.executable, "-c", f"{blind}sys.exit(main(sys.argv[1:]))", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 74 and "Traceback" not in done.stderr, done.stderr
    assert ("GB are free" if seen else "No space left") in done.stderr
    assert "checkpoints before it are untouched" in done.stderr and done.stderr.count("sctd: error") == 1
    newest = newest_whole(run_dir)
    assert newest is not None and not list((run_dir / "checkpoints").glob(".step*"))
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    train(recipe, run_dir, *SAVES, "--resume")
    assert_same_run(run_dir, saved)


def has_trained(run_dir: Path, steps: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(records(run_dir)) >= steps


def test_a_clock_that_jumps(recipe: Path, tmp_path: Path) -> None:
    """A day back and two days on, in the middle of a run: nothing that counts is told by that clock."""
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed")
    library = subprocess.run(
        ["faketime", "-f", "+0", "printenv", "LD_PRELOAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    offset, run_dir = tmp_path / "offset", tmp_path / "run"
    offset.write_text("+0")
    env = environment() | {
        "LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    steps = ("train.steps=60", "train.save_every=25")
    command = [sys.executable, "-m", "sctd", "pretrain", str(recipe), f"run.dir={run_dir}", *steps]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for jump, step in (("-1d", 3), ("+2d", 20)):
        until(lambda step=step: process.poll() is not None or has_trained(run_dir, step), f"step {step}", 120)
        assert process.poll() is None, process.communicate()[0]
        offset.write_text(jump)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    train(recipe, tmp_path / "whole", *steps)
    assert_same_run(run_dir, tmp_path / "whole")
    assert all(0 < record["step_seconds"] < 60 for record in records(run_dir))
    assert records(run_dir)[-1]["seconds"] < 300
    assert "done" in sctd("status", run_dir).stdout

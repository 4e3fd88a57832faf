"""What `sctd status` and `sctd checkpoints` say of real runs: finished, stopped, killed, at work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sctd.train.keep.attempts import read_attempts
from support import environment, records, sctd, train, until


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped at step 3, continued and killed, continued to the end."""
    run_dir = tmp_path_factory.mktemp("status") / "run"
    steps = ("train.steps=4000", "train.save_every=2", "train.valid_rows=2")
    train(recipe, run_dir, *steps, "train.stop_at=3")
    command = [sys.executable, "-m", "sctd", "pretrain", str(recipe), f"run.dir={run_dir}", *steps, "--resume"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    until(lambda: len(records(run_dir)) > 8, "step 9", 120)
    said = sctd("status", run_dir).stdout
    process.kill()
    process.wait()
    assert f"running: process {process.pid} on" in said and "  running  (" in said and "\nrequests" not in said
    goal = records(run_dir)[-1]["step"] + 3
    train(recipe, run_dir, *steps, f"train.stop_at={goal}", "--resume")
    return run_dir


def test_status_tells_the_chain_of_jobs(run: Path) -> None:
    done = sctd("status", run)
    assert done.returncode == 0, done.stderr
    last, attempts = records(run)[-1], read_attempts(run)
    assert "sctd, bert, 4 layers x 32" in done.stdout and f"step {last['step']:,} of 4,000" in done.stdout
    assert f"{last['loss']:.4f}, held-out {last['valid_loss']:.4f}" in done.stdout
    gap, use = abs(last["valid_gap"]), last["context_use"]
    side = "below" if last["valid_gap"] > 0 else "above"
    assert f"learning     {gap:.2f} nats {side} the unigram entropy (not yet 1 nat below it)" in done.stdout
    assert f"context use {use:.2f}, masked accuracy {last['valid_accuracy']:.1%}" in done.stdout
    assert "not running" in done.stdout and "attempts     3" in done.stdout
    chain = done.stdout.splitlines()[-3:]
    assert "steps 0 to 3  done" in chain[0] and "killed" in chain[1] and "done" in chain[2]
    assert [attempt["ranks"] for attempt in attempts] == [1, 1, 1] and "ended" not in attempts[1]
    assert attempts[2]["step"] >= 8 and attempts[2]["ended"]["step"] == last["step"]


def test_requests_are_shown_until_the_run_sees_them(run: Path) -> None:
    (run / "SAVE").touch()
    try:
        assert "requests     SAVE" in sctd("status", run).stdout
    finally:
        (run / "SAVE").unlink()


def test_checkpoints_are_listed_and_verified(run: Path) -> None:
    done = sctd("checkpoints", run)
    found = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    lines = done.stdout.splitlines()[1:]
    assert done.returncode == 0 and len(lines) == len(found) == 2
    assert all("whole" in line and " 0.7 MB" in line for line in lines)
    assert [int(line.split()[0]) for line in lines] == [int(path.name[5:]) for path in found]
    file = found[0] / "state.json"
    before = file.read_bytes()
    file.write_bytes(before[:-1])
    assert "state.json has" in sctd("checkpoints", run).stdout.splitlines()[1]
    file.write_bytes(before)


def test_a_failed_attempt_says_how(recipe: Path, tmp_path: Path) -> None:
    """The disk is full at the first save: a file stands where the checkpoints' folder would be."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("no folder")
    done = sctd("pretrain", recipe, f"run.dir={tmp_path / 'run'}", "train.steps=3")
    assert done.returncode == 74 and "Traceback" not in done.stderr, done.stderr
    assert "steps 0 to 3  failed: disk" in sctd("status", tmp_path / "run").stdout


def test_a_loss_that_is_not_finite_and_a_bad_byte_are_reported(run: Path) -> None:
    file = run / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + b'\xff\xfe{"step"\n' + json.dumps({**records(run)[-1], "loss": None}).encode() + b"\n")
    done = sctd("status", run)
    assert done.returncode == 0 and "loss         not finite" in done.stdout, done.stderr
    file.write_bytes(before)


@pytest.mark.parametrize("verb", ["status", "checkpoints"])
def test_a_folder_without_a_run_is_refused(verb: str, tmp_path: Path) -> None:
    done = sctd(verb, tmp_path)
    assert done.returncode == 2 and "holds no run" in done.stderr and done.stderr.count("\n") == 1


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    first = {"start": "2026-01-01T00:00:00+00:00", "step": 0, "ranks": 1, "host": "a", "pid": 1}
    lines = [json.dumps(first), '{"end": "2026", "st', '{"end": "2026", "step": 3}', "[1]", '{"start": "2026"}']
    (tmp_path / "attempts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [attempt["step"] for attempt in read_attempts(tmp_path)] == [0]
    assert read_attempts(tmp_path / "none") == []

"""Stopping on request: a run that was stopped anywhere ends as if it never had been."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sctd.files import free_port
from sctd.train.engine.distributed import World
from sctd.train.keep.preemption import Mailbox, Requests
from support import Child, assert_same_run, records, sctd, start_ranks, train, until

STEPS = ("train.steps=40", "train.log_every=1", "train.save_every=0")


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs of one and of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        train(recipe, folder / str(ranks), *STEPS, ranks=ranks if ranks > 1 else 0)
    return {ranks: folder / str(ranks) for ranks in (1, 2)}


def start(recipe: Path, run_dir: Path, ranks: int) -> list[Child]:
    """A run in the background that has trained its first steps: its ranks."""
    children = start_ranks("pretrain", recipe, f"run.dir={run_dir}", *STEPS, ranks=ranks, merged=True)
    ended = lambda: any(each.poll() is not None for each in children)  # noqa: E731
    until(lambda: ended() or has_trained(run_dir, 3), "third step", 120)
    assert not ended(), children[0].output
    return children


def has_trained(run_dir: Path, steps: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(records(run_dir)) >= steps


def finish(recipe: Path, run_dir: Path, ranks: int, whole: dict[int, Path]) -> None:
    assert len(records(run_dir)) < 40, "the run ended before it was asked to stop"
    train(recipe, run_dir, *STEPS, "--resume", ranks=ranks if ranks > 1 else 0)
    assert_same_run(run_dir, whole[ranks])


def by_file(process: Child, run_dir: Path) -> None:
    (run_dir / "STOP").touch()


@pytest.mark.parametrize(
    "ask",
    [
        lambda process, _: process.send_signal(signal.SIGUSR1),
        lambda process, _: process.send_signal(signal.SIGTERM),
        by_file,
    ],
    ids=["SIGUSR1", "SIGTERM", "STOP"],
)
def test_one_rank_is_asked_to_stop(
    ask: Callable[[Child, Path], None], recipe: Path, tmp_path: Path, whole: dict[int, Path]
) -> None:
    (process,) = start(recipe, tmp_path, 1)
    ask(process, tmp_path)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "continue with --resume" in said and not (tmp_path / "STOP").exists()
    assert (tmp_path / "stopped").exists() == (ask is by_file)  # so that a job script knows that a person asked
    finish(recipe, tmp_path, 1, whole)


def test_one_rank_of_two_is_asked_and_both_stop(recipe: Path, tmp_path: Path, whole: dict[int, Path]) -> None:
    children = start(recipe, tmp_path, 2)
    children[1].send_signal(signal.SIGUSR1)  # not the one that writes
    said = [each.communicate(timeout=60)[0] for each in children]
    assert "continue with --resume" in said[0] and [each.returncode for each in children] == [75, 75], said
    finish(recipe, tmp_path, 2, whole)


def test_a_signal_before_the_first_step_ends_the_process(recipe: Path, tmp_path: Path) -> None:
    """Rank 0 of two waits for a second one that never comes: it says so, and stops when asked."""
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = Child(["pretrain", recipe, f"run.dir={tmp_path / 'run'}"], merged=True, **told)
    until(lambda: "waiting for rank 1 of 2" in process.output, "a word on rank 1")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "SIGTERM) before the first step" in said, said


def test_requests_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    (tmp_path / "STOP").mkdir()
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "full").touch()
    (tmp_path / "SAVE").mkdir()
    requests = Requests(Mailbox(), tmp_path, World(0, 1, torch.device("cpu")), 1.0)
    requests.agree()
    assert not requests.stop and not requests.save


def test_a_save_on_request(recipe: Path, tmp_path: Path, whole: dict[int, Path]) -> None:
    (process,) = start(recipe, tmp_path, 1)
    (tmp_path / "SAVE").touch()
    until(lambda: (tmp_path / "checkpoints" / "latest").exists(), "a checkpoint")
    process.kill()  # so that there is nothing but this checkpoint to go on from
    process.communicate()
    assert not (tmp_path / "SAVE").exists()
    finish(recipe, tmp_path, 1, whole)


def test_a_run_that_died_before_its_first_save_starts_again(
    recipe: Path, tmp_path: Path, whole: dict[int, Path]
) -> None:
    (process,) = start(recipe, tmp_path, 1)
    process.kill()
    process.communicate()
    done = train(recipe, tmp_path, *STEPS, "--resume")
    assert "has no checkpoint yet" in done.stdout
    assert_same_run(tmp_path, whole[1])


def test_a_second_job_on_a_run_is_refused(recipe: Path, tmp_path: Path, whole: dict[int, Path]) -> None:
    (process,) = start(recipe, tmp_path, 1)
    process.send_signal(signal.SIGSTOP)  # so that it does not end before the second one asks
    try:
        began = time.monotonic()
        second = sctd("pretrain", recipe, f"run.dir={tmp_path}", *STEPS, "--resume")
        assert second.returncode == 2 and time.monotonic() - began < 60
        assert f"in use by process {process.pid} on" in second.stderr
    finally:
        process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert_same_run(tmp_path, whole[1])

"""Evaluation while a run trains: what it measures is what `sctd probe` measures, and the training does not notice."""

import os
import signal
import subprocess
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sctd.cli import main
from sctd.evaluate.analyse.probe import layer_accuracies, read_task
from sctd.evaluate.encoder import open_encoder
from sctd.evaluate.finetune.material import read_material
from sctd.evaluate.finetune.training import Setting, fit
from sctd.evaluate.tasks.task import load_task
from sctd.train.loop.evaluation import _scores
from support import assert_same_run, environment, launcher, records, train, until
from tiny_bert import write_order

STEPS = ("train.steps=8", "train.save_every=4")


@pytest.fixture(scope="module")
def plain(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without evaluation."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train(recipe, run_dir, *STEPS)
    return run_dir


@pytest.fixture(scope="module")
def watched(recipe: Path, task: Path, own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, evaluated at steps 4 and 8."""
    run_dir = tmp_path_factory.mktemp("watched") / "run"
    both = (f"evaluation.probes=[{task}]", f"evaluation.task={own}", "evaluation.steps=12")
    train(recipe, run_dir, *STEPS, "evaluation.every=4", *both)
    return run_dir


def test_the_training_does_not_notice(plain: Path, watched: Path) -> None:
    assert_same_run(plain, watched)
    assert not any(key.startswith("eval/") for record in records(plain) for key in record)


def test_scores_are_in_the_records_and_on_the_board(watched: Path) -> None:
    board = EventAccumulator(str(watched)).Reload()
    for name in ("eval/probe_order", "eval/probe_order_best", "eval/when"):
        scores = {record["step"]: record[name] for record in records(watched) if name in record}
        assert list(scores) == [4, 8] and all(0 < score <= 1 for score in scores.values())
        assert {event.step: event.value for event in board.Scalars(name)} == pytest.approx(scores)


@pytest.mark.parametrize("run", ["watched", "modern"])
def test_scores_are_those_of_the_checkpoint(run: str, task: Path, own: Path, request: pytest.FixtureRequest) -> None:
    run_dir = request.getfixturevalue(run)
    encoder, last = open_encoder(str(run_dir)), records(run_dir)[-1]
    found = layer_accuracies(encoder, read_task(str(task), None), "mean")
    assert last["eval/probe_order"] == pytest.approx(found[-1]["accuracy"], abs=0.011)
    assert last["eval/probe_order_best"] == pytest.approx(max(layer["accuracy"] for layer in found), abs=0.011)
    tuned = fit(encoder, read_material(load_task(str(own)), None, encoder).data(None, 1), Setting(1e-3, 32, 12, 1))
    assert last["eval/when"] == pytest.approx(tuned.curve[-1]["accuracy"], abs=0.026)


def test_the_clock_stands_still(watched: Path) -> None:
    """From before the evaluation at step 4 until after step 5: what the clock counts is the steps alone."""
    events = {event.step: event for event in EventAccumulator(str(watched)).Reload().Scalars("speed/seconds")}
    assert events[5].value - events[3].value < 0.5 * (events[5].wall_time - events[3].wall_time)


def test_a_signal_ends_the_evaluation_and_saves(recipe: Path, plain: Path, task: Path, tmp_path: Path) -> None:
    """To rank 1 of 2, while rank 0 measures the weights of both; then the run goes on under another ZeRO stage."""
    large, run_dir, scratch = write_order(tmp_path / "large.txt", 60_000), tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    arguments = [f"run.dir={run_dir}", *STEPS, "evaluation.every=2", f"evaluation.probes=[{large}]"]
    process = subprocess.Popen(
        [*launcher("torchrun", 2), "sctd", "pretrain", str(recipe), *arguments],
        env=environment() | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = until(lambda: process.poll() is not None or _written(scratch), "evaluation", 120)
    assert isinstance(folder, Path), process.communicate()[0]
    measured = load_file(folder / "model.safetensors")
    rank_1 = next(pid for pid in _children(process.pid) if _rank(pid) == "1")
    os.kill(rank_1, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "evaluation left: the job is asked to stop" in said and "saved: continue with --resume" in said, said
    assert [record["step"] for record in records(run_dir)] == [1, 2] and not list(scratch.glob("sctd-*"))
    saved = load_file(Path(open_encoder(str(run_dir)).source) / "model.safetensors")
    assert measured.keys() == saved.keys() and all(measured[name].equal(saved[name]) for name in saved)

    other = ("train.zero_stage=3", "evaluation.every=8", f"evaluation.probes=[{task}]")
    train(recipe, run_dir, *STEPS, *other, "--resume", ranks=2)
    last = records(run_dir)[-1]
    assert last["ledger"] == records(plain)[-1]["ledger"]
    found = layer_accuracies(open_encoder(str(run_dir)), read_task(str(task), None), "mean")
    assert last["eval/probe_order"] == pytest.approx(found[-1]["accuracy"], abs=0.011)


def _written(scratch: Path) -> Path | None:
    """The folder that is measured, once all of it is there; the tokenizer's configuration comes last."""
    return next((file.parent for file in scratch.glob("sctd-*/tokenizer_config.json") if file.stat().st_size), None)


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def _rank(pid: int) -> str | None:
    return psutil.Process(pid).environ().get("RANK")


def test_an_evaluation_that_fails_does_not_end_the_run() -> None:
    failed: Future[dict[str, float]] = Future()
    failed.set_exception(RuntimeError("no such luck"))
    said: list[str] = []
    assert _scores(failed, said.append) == {}
    assert said == ["evaluation failed (RuntimeError: no such luck): training goes on without it"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation.every=-1"], ["evaluation.every", "at least 0"]),
        (["evaluation.every=5"], ["evaluation.every", "evaluation.probes", "evaluation.task"]),
        (["evaluation.every=5", "evaluation.probes=[tens]"], ["tens", "did you mean 'tense'"]),
        (["evaluation.every=5", "evaluation.probes=[tense]"], ["past_present.txt", "evaluation.data_dir"]),
        (["evaluation.every=5", "evaluation.probes=[tense]", "evaluation.data_dir=nowhere"], ["nowhere"]),
        (["evaluation.every=5", "evaluation.task=rtf"], ["rtf", "rte"]),
        (["evaluation.every=5", "evaluation.task=rte", "evaluation.data_dir=nowhere"], ["nowhere"]),
        (["evaluation.every=5", "evaluation.task=rte", "evaluation.steps=0"], ["evaluation.steps", "at least 1"]),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(
    overrides: list[str], words: list[str], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(recipe), f"run.dir={tmp_path / 'run'}", *overrides]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()

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
from sctd.corpus.manifest import load_corpus_tokenizer, read_manifest
from sctd.evaluate.analyse.probe import layer_accuracies, read_task
from sctd.evaluate.encoder import Encoder, from_memory, load_tokenizer, load_weights, open_encoder
from sctd.evaluate.finetune.task_data import read_task_data
from sctd.evaluate.finetune.training import Setting, fit
from sctd.evaluate.tasks.task import load_task
from sctd.files import read_json
from sctd.objective.build import bert_shape
from sctd.train.keep.checkpoint import checkpoints, read_weights
from sctd.train.keep.export import read_run
from sctd.train.loop.evaluation import _scores
from support import assert_same_run, environment, launcher, records, sctd, train, until
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
def test_scores_are_those_of_the_checkpoint(
    run: str, task: Path, own: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """As the command line measures its export, in a process of its own: the same to the last digit."""
    run_dir = request.getfixturevalue(run)
    last, common = records(run_dir)[-1], ("--task", own, "--lr", 1e-3, "--batch-size", 32, "--steps", 12)
    for call in (("probe", run_dir, "--task", task), ("finetune", run_dir, *common, "--seeds", 1)):
        done = sctd(*call, "--out", tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    accuracies = [layer["accuracy"] for layer in read_json(tmp_path / "probe" / "order.json")["layers"]]
    assert last["eval/probe_order"] == accuracies[-1] and last["eval/probe_order_best"] == max(accuracies)
    (tuned,) = tmp_path.glob("finetune/when/*/result.json")
    assert last["eval/when"] == read_json(tuned)["scores"]["last"]["accuracy"]


def of_checkpoint(run_dir: Path) -> Encoder:
    """Its newest weights, in memory as a run that trains has them."""
    manifest = read_manifest(run_dir / "corpus")
    weights = read_weights(checkpoints(run_dir)[0])
    state = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
    tokenizer = load_corpus_tokenizer(run_dir / "corpus", manifest)
    return from_memory(state, bert_shape(read_run(run_dir), manifest), tokenizer)


@pytest.mark.parametrize("run", ["watched", "modern"])
def test_weights_in_memory_are_the_export_bit_for_bit(
    run: str, task: Path, own: Path, request: pytest.FixtureRequest
) -> None:
    run_dir = request.getfixturevalue(run)
    memory, export = of_checkpoint(run_dir), open_encoder(str(run_dir))
    models = [load_weights(each, "AutoModelForMaskedLM") for each in (memory, export)]
    (ours, theirs), written = (model.state_dict() for model in models), {"_name_or_path", "transformers_version"}
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    ours, theirs = ({k: v for k, v in model.config.to_dict().items() if k not in written} for model in models)
    assert ours == theirs
    texts = ["The list of values.", "[MASK] is Ünïcode 3", "a " * 200, ""]
    tokenizers = [load_tokenizer(each) for each in (memory, export)]
    ids = [dict(each(texts, texts[::-1], truncation=True, max_length=40)) for each in tokenizers]
    assert ids[0]["input_ids"] == ids[1]["input_ids"]
    assert all(ids[0][name] == ids[1][name] for name in ids[0].keys() & ids[1].keys())
    assert tokenizers[0].model_max_length == tokenizers[1].model_max_length
    assert tokenizers[0].pad_token_id == tokenizers[1].pad_token_id
    probe = read_task(str(task), None)
    assert layer_accuracies(memory, probe, "mean") == layer_accuracies(export, probe, "mean")
    outcomes = [
        fit(read_task_data(load_task(str(own)), None, each), Setting(1e-3, 32, 12, 1))
        for each in (memory, export, memory)
    ]
    assert outcomes[0].curve == outcomes[1].curve == outcomes[2].curve  # a fine-tuning leaves the weights as they are
    assert outcomes[0].predictions == outcomes[1].predictions


def test_the_clock_stands_still(watched: Path) -> None:
    """From before the evaluation at step 4 until after step 5: what the clock counts is the steps alone."""
    events = {event.step: event for event in EventAccumulator(str(watched)).Reload().Scalars("speed/seconds")}
    assert events[5].value - events[3].value < 0.5 * (events[5].wall_time - events[3].wall_time)


WATCHED = """
import sys
from pathlib import Path
from safetensors.torch import save_file
import sctd.evaluate.during as during
from sctd.cli import main
from sctd.corpus.manifest import load_corpus_tokenizer, read_manifest
from sctd.model.convert import to_hf_state

build = during.build_evaluator


def build_watched(config):
    measure = build(config)

    def evaluate(state, shape, tokenizer, check):
        save_file(to_hf_state(state, shape), "measured.tmp")
        Path("measured.tmp").rename("measured.safetensors")
        return measure(state, shape, tokenizer, check)

    return evaluate


during.build_evaluator = build_watched
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_ends_the_evaluation_and_saves(recipe: Path, plain: Path, task: Path, tmp_path: Path) -> None:
    """To rank 1 of 2, while rank 0 measures the weights of both; then the run goes on under another ZeRO stage."""
    large, run_dir, script = write_order(tmp_path / "large.txt", 60_000), tmp_path / "run", tmp_path / "watched.py"
    script.write_text(WATCHED, encoding="utf-8")  # `sctd` that writes what it measures
    arguments = [f"run.dir={run_dir}", *STEPS, "evaluation.every=2", f"evaluation.probes=[{large}]"]
    *launch, _ = launcher("torchrun", 2)  # without -m
    process = subprocess.Popen(
        [*launch, str(script), "pretrain", str(recipe), *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    path = tmp_path / "measured.safetensors"
    until(lambda: process.poll() is not None or path.exists(), "evaluation", 120)
    assert path.exists(), process.communicate()[0]
    measured = load_file(path)
    rank_1 = next(pid for pid in _children(process.pid) if _rank(pid) == "1")
    os.kill(rank_1, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "evaluation left: the job is asked to stop" in said and "saved: continue with --resume" in said, said
    assert [record["step"] for record in records(run_dir)] == [1, 2]
    saved = load_file(Path(open_encoder(str(run_dir)).source) / "model.safetensors")
    assert measured.keys() == saved.keys() and all(measured[name].equal(saved[name]) for name in saved)

    other = ("train.zero_stage=3", "evaluation.every=8", f"evaluation.probes=[{task}]")
    train(recipe, run_dir, *STEPS, *other, "--resume", ranks=2)
    last = records(run_dir)[-1]
    assert last["ledger"] == records(plain)[-1]["ledger"]
    found = layer_accuracies(open_encoder(str(run_dir)), read_task(str(task), None), "mean")
    assert last["eval/probe_order"] == pytest.approx(found[-1]["accuracy"], abs=0.011)


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

"""One fine-tuning: it computes what a plain loop over transformers' models does, it repeats, and it learns."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import get_linear_schedule_with_warmup

from sctd.errors import UserError
from sctd.evaluate.encoder import open_encoder
from sctd.evaluate.finetune import training
from sctd.evaluate.finetune.features import steps_of_pass, training_batches
from sctd.evaluate.finetune.task_data import TaskData, build_model, read_task_data
from sctd.evaluate.finetune.training import Outcome, Setting, evaluation_steps, fit, metric_names
from sctd.evaluate.tasks.task import load_task
from tiny_bert import tiny_bert, write_conll, write_copa, write_rte, write_squad, write_stsb

FAMILIES = ("bert", "modernbert")
pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("model")
    return {family: tiny_bert(folder / family, family=family) for family in FAMILIES}


@pytest.fixture(scope="module")
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["bert"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for write in (write_rte, write_stsb, write_copa, write_squad, write_conll):
        write(folder)
    return write_squad(folder, unanswerable=True)


def data_of(checkpoint: Path, data: Path, task: str) -> TaskData:
    return read_task_data(load_task(task), data, open_encoder(str(checkpoint)))


def run(found: TaskData, lr: float, batch_size: int, steps: int, seed: int = 1) -> Outcome:
    return fit(found, Setting(lr, batch_size, steps, seed))


# ---- the same as a plain loop


HEADS = {
    "rte": ("AutoModelForSequenceClassification", {"num_labels": 2}),
    "stsb": ("AutoModelForSequenceClassification", {"num_labels": 1}),
    "copa": ("AutoModelForMultipleChoice", {}),
    "squad2": ("AutoModelForQuestionAnswering", {}),
    "conll03": ("AutoModelForTokenClassification", {"num_labels": 9}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", HEADS)
def test_the_model_is_that_of_a_plain_script(checkpoints: dict[str, Path], data: Path, task: str, family: str) -> None:
    (head, labels), checkpoint = HEADS[task], checkpoints[family]
    found = data_of(checkpoint, data, task)
    ours = build_model(found.encoder, found.task, found.train.classes, seed=3)
    torch.manual_seed(3)
    theirs = getattr(transformers, head).from_pretrained(checkpoint, dtype=torch.float32, **labels)
    assert type(ours) is type(theirs)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in ours.state_dict().items())
    other = build_model(found.encoder, found.task, found.train.classes, seed=4).state_dict()
    heads = {name.split(".")[0] for name in state if not other[name].equal(state[name])}
    assert heads <= {"classifier", "qa_outputs", "bert"}  # BERT's pooler is a part of the head
    assert any(not other[name].equal(state[name]) for name in state)
    assert all(other[name].equal(state[name]) for name in state if ".layer" in name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", HEADS)
def test_losses_and_predictions_are_those_of_a_plain_loop(data: Path, tmp_path: Path, task: str, family: str) -> None:
    """Dropout is off: its draws would depend on how batches are padded."""
    checkpoint = tiny_bert(tmp_path / "still", family=family, dropout=0.0)
    found = data_of(checkpoint, data, task)
    train, dev = found.features(None, 1), found.dev_features["dev"]
    outcome = run(found, 1e-3, 8, steps=12)
    model = build_model(found.encoder, found.task, found.train.classes, seed=1).train()
    plain = [p for name, p in model.named_parameters() if "norm" in name.lower() or name.endswith("bias")]
    decayed = [p for p in model.parameters() if all(p is not other for other in plain)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 12)  # 6 % of 12 steps
    losses = []
    for _, rows in zip(range(12), training_batches(train.lengths_N, 8, seed=1), strict=False):
        loss = model(**train.batch(rows, torch.device("cpu"))).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    (point,) = outcome.curve
    assert point["step"] == 12 and point["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    if task in ("rte", "stsb"):
        rows = np.arange(len(dev))
        logits = model.eval()(**dev.batch(rows, torch.device("cpu"), labels=False)).logits
        expected = logits[:, 0] if task == "stsb" else logits.argmax(-1)
        assert outcome.predictions["last"]["dev"] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_do_not_depend_on_the_batch(
    checkpoints: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    for task in ("squad2", "conll03", "copa"):
        found = data_of(checkpoints[family], data, task)
        model = build_model(found.encoder, found.task, found.train.classes, 1)
        predicted = []
        for tokens in (64, 100_000):
            monkeypatch.setitem(training._TOKENS, "cpu", tokens)
            predicted.append(training.predict(model, found, torch.device("cpu"), lambda: None))
        assert predicted[0] == predicted[1], task


# ---- repeats


@pytest.mark.parametrize("task", ["rte", "squad1"])
def test_a_second_run_gives_the_same_numbers_and_another_seed_others(checkpoint: Path, data: Path, task: str) -> None:
    found = data_of(checkpoint, data, task)
    first, second = run(found, 1e-3, 8, 30), run(found, 1e-3, 8, 30)
    assert first.curve == second.curve and first.predictions == second.predictions
    assert run(found, 1e-3, 8, 30, seed=2).curve[0]["loss"] != first.curve[0]["loss"]


def test_it_is_evaluated_after_each_pass_and_at_the_end() -> None:
    assert evaluation_steps(40, 10) == [10, 20, 30, 40]
    assert evaluation_steps(2036, 156) == [*range(156, 2029, 156), 2036]
    assert evaluation_steps(7, 10) == [7]
    assert evaluation_steps(1000, 10) == [*range(50, 1001, 50)]
    for steps, one_pass in ((10_000, 3), (999, 10), (21, 1), (41, 2), (1, 1)):
        found = evaluation_steps(steps, one_pass)
        assert len(found) <= 20 and found[-1] == steps and found == sorted(set(found))


def test_the_best_evaluation_is_kept_beside_the_last(checkpoint: Path, data: Path) -> None:
    """Learned, then forgotten: a learning rate that is much too high near its peak."""
    found = data_of(checkpoint, data, "rte")
    points: list[dict[str, Any]] = []
    outcome = fit(found, Setting(3e-3, 16, 60, 1), points.append)
    assert outcome.curve == points and [point["epoch"] for point in points] == [1, 2, 3, 4, 5, 6]
    accuracies = [point["accuracy"] for point in points]
    assert outcome.best == accuracies.index(max(accuracies))
    labels = [row.label for row in found.dev["dev"].rows]  # type: ignore[union-attr]
    for name, place in (("best", outcome.best), ("last", -1)):
        predicted = outcome.predictions[name]["dev"]
        right = np.mean([one == other for one, other in zip(predicted, labels, strict=True)])
        assert right == pytest.approx(accuracies[place])
    assert outcome.examples == 6 * 160 and outcome.tokens > 10 * outcome.examples and outcome.seconds > 0


# ---- learns


@pytest.mark.parametrize(
    ("task", "metric", "least"),
    [
        ("rte", "accuracy", 0.95),  # by chance 0.5
        ("stsb", "spearman", 0.7),  # 0
        ("copa", "accuracy", 0.95),  # 0.5
        ("squad1", "exact_match", 0.6),  # 0.1
        ("squad2", "exact_match", 0.6),  # 0.3 for never an answer
        ("conll03", "f1", 0.6),  # 0
    ],
)
def test_a_tiny_model_learns_what_is_easy(checkpoint: Path, data: Path, task: str, metric: str, least: float) -> None:
    outcome = run(data_of(checkpoint, data, task), 5e-3, 16, steps=80)
    assert outcome.curve[-1][metric] > least, outcome.curve
    assert outcome.curve[0]["loss"] > outcome.curve[-1]["loss"]


# ---- what goes wrong


@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_a_loss_that_is_not_finite_ends_it(checkpoint: Path, data: Path, task: str) -> None:
    with pytest.raises(UserError) as caught:
        run(data_of(checkpoint, data, task), 1e30, 8, steps=300)
    assert "not finite" in str(caught.value) and "--lr" in str(caught.value) and "\n" not in str(caught.value)


def test_outputs_that_are_not_finite_end_it(checkpoint: Path, data: Path) -> None:
    """After a last step from which no loss was computed any more."""
    found = data_of(checkpoint, data, "rte")
    model = build_model(found.encoder, found.task, found.train.classes, 1)
    torch.nn.init.constant_(model.classifier.bias, math.nan)
    with pytest.raises(UserError, match="outputs are not finite"):
        training.predict(model, found, torch.device("cpu"), lambda: None)


def test_a_check_that_raises_ends_it(checkpoint: Path, data: Path) -> None:
    class Enough(Exception):
        pass

    def after(calls: int) -> Callable[[], None]:
        left = iter(range(calls))

        def check() -> None:
            if next(left, None) is None:
                raise Enough

        return check

    found = data_of(checkpoint, data, "rte")
    for calls in (0, 3, 10):  # 10 steps, then evaluation
        with pytest.raises(Enough):
            fit(found, Setting(1e-3, 16, 10, 1), check=after(calls))


def test_words_behind_the_last_position_are_in_no_entity(data: Path, tmp_path: Path) -> None:
    found = data_of(tiny_bert(tmp_path / "short", positions=8), data, "conll03")
    assert found.coding.limit == 8 and found.cut(None)["dev"] > 20
    outcome = run(found, 3e-3, 16, steps=100)
    for row, tags in zip(found.dev["dev"].rows, outcome.predictions["last"]["dev"], strict=True):
        assert len(tags) == len(row.tokens) and not any(tags[6:])  # type: ignore[union-attr]
    assert 0.3 < outcome.curve[-1]["recall"] < 0.97


def test_the_mismatched_metrics_have_names_of_their_own() -> None:
    assert metric_names(load_task("mnli"), ["dev", "dev_mm"]) == ["accuracy", "accuracy_mm"]
    assert metric_names(load_task("mrpc"), ["dev"]) == ["accuracy", "f1"]
    assert steps_of_pass(17, 8) == 3

"""Held-out loss, accuracy and context use: against the numbers by hand, and the same for any number of ranks."""

import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sctd.config import FAMILIES, ObjectiveConfig
from sctd.data.masking import Masker
from sctd.data.stream import valid_batches
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import LayerPlan
from sctd.objective.pretraining import PretrainingModel
from sctd.train.engine.distributed import World
from sctd.train.loop import validation as module
from sctd.train.loop.validation import context_use, held_out

VOCAB, LENGTH, MASK = 60, 32, 4
T = TypeVar("T")


def on_ranks(size: int, work: Callable[[World], T], monkeypatch: pytest.MonkeyPatch) -> list[T]:
    """What each rank of a group answers; the ranks are threads, and meet at each all-reduce."""
    ranks = [World(rank, size, torch.device("cpu")) for rank in range(size)]
    barrier, given = threading.Barrier(size, timeout=60), {}
    answers: dict[int, T] = {}

    def all_reduce(tensor: Tensor) -> None:
        given[threading.get_ident()] = tensor.clone()
        barrier.wait()
        tensor.copy_(sum(given.values()))
        barrier.wait()
        given.clear()
        barrier.wait()

    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)
    threads = [threading.Thread(target=lambda w=world: answers.__setitem__(w.rank, work(w))) for world in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[rank] for rank in range(size)]


# ---- context use


def use(predicted: Tensor) -> float:
    return context_use(predicted, World(0, 1, torch.device("cpu")))


def test_equal_predictions_use_no_context() -> None:
    assert use(torch.rand(7).softmax(0).expand(20, 7)) == pytest.approx(0, abs=1e-6)
    assert use(torch.eye(7)[[3] * 20]) == 0.0
    assert use(torch.empty(0, 7)) == 0.0


@pytest.mark.parametrize("count", [2, 10, 500])
def test_distinct_predictions_use_all_of_it(count: int) -> None:
    """Sure of N different tokens: each is 1 - 1/N away from the mean."""
    assert use(torch.eye(count)) == pytest.approx(1 - 1 / count, rel=1e-5)


def test_between_the_two_it_is_the_mean_total_variation_distance() -> None:
    predicted = torch.randn(30, 11, generator=torch.Generator().manual_seed(0)).softmax(-1)
    mean = predicted.double().mean(0)
    distances = [(row - mean).clamp(min=0).sum().item() for row in predicted.double()]
    assert use(predicted) == pytest.approx(sum(distances) / 30, rel=1e-5)
    assert 0.1 < use(predicted) < 0.9
    sharper = (predicted.log() * 3).softmax(-1)
    assert use(sharper) > use(predicted)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("cuts", [(10, 20), (1, 2), (0, 30), (30, 30)])
def test_context_use_over_ranks(size: int, cuts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However the masks fall to the ranks, and where one has none."""
    predicted = torch.randn(30, 11, generator=torch.Generator().manual_seed(0)).softmax(-1)
    parts = torch.tensor_split(predicted, cuts[: size - 1])
    found = on_ranks(size, lambda world: context_use(parts[world.rank], world), monkeypatch)
    assert len(set(found)) == 1 and found[0] == pytest.approx(use(predicted), rel=1e-6)


# ---- validation


class Engine:
    """As much of DeepSpeed's as a validation takes."""

    def __init__(self, model: PretrainingModel) -> None:
        self.module, self.eval, self.train = model, model.eval, model.train

    def __call__(self, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert not self.module.training and not torch.is_grad_enabled()
        return self.module(**batch)


def make_model(family: str = "bert", dropout: float = 0.0) -> PretrainingModel:
    torch.manual_seed(0)
    shape = BertShape(VOCAB, 2, 32, 2, 64, LENGTH, dropout, dropout, initializer_range=0.3, family=family)
    return PretrainingModel(Bert(shape), LayerPlan(2, 0, 1), ObjectiveConfig()).train()


def make_masker(share: float = 0.15) -> Masker:
    return Masker(1, VOCAB, MASK, (0, 1, 2, 3, 4), share)


ROWS = np.random.default_rng(0).integers(5, VOCAB, (41, LENGTH))
Never = lambda: False  # noqa: E731


def measured(
    world: World, model: PretrainingModel, masker: Masker, limit: int = 40, batch: int = 6
) -> dict[str, float]:
    return held_out(Engine(model), ROWS, masker, limit, batch, world, Never)  # type: ignore[arg-type]


def by_hand(model: PretrainingModel, masker: Masker, limit: int = 40) -> dict[str, Any]:
    """From the logits of whole rows, one at a time."""
    losses, hits, predicted = [], [], []
    was = model.training
    model.eval()
    for number, (_, row) in enumerate(valid_batches(ROWS, masker, limit, 1, 0, 1)):  # type: ignore[arg-type]
        with torch.no_grad():
            logits = model.bert(row["input_ids"])[0, row["positions"][0]].double()
        labels = row["labels"][0]
        losses += (-logits.log_softmax(-1)[torch.arange(len(labels)), labels]).tolist()
        hits += (logits.argmax(-1) == labels).tolist()
        if number < 512 // len(labels):
            is_mask = row["input_ids"][0, row["positions"][0]] == MASK
            predicted.append(logits.softmax(-1)[is_mask].float())
    model.train(was)
    loss = sum(losses) / len(losses)
    return {
        "valid_loss": loss,
        "valid_accuracy": sum(hits) / len(hits),
        "valid_perplexity": math.exp(loss),
        "context_use": use(torch.cat(predicted)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_full_path_without_dropout(family: str) -> None:
    model, world = make_model(family, dropout=0.3), World(0, 1, torch.device("cpu"))
    found, expected = measured(world, model, make_masker()), by_hand(model, make_masker())
    assert found == pytest.approx(expected, rel=1e-5) and model.training
    assert 0.05 < found["context_use"] < 1 and 0 < found["valid_accuracy"] < 0.2


@pytest.mark.parametrize(("limit", "share"), [(40, 0.15), (7, 0.15), (1, 0.15), (40, 0.5)])
def test_any_number_of_ranks_measures_the_same(limit: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of the tokens masked, 32 rows give the contexts that are compared, and 8 more give losses alone."""
    expected = by_hand(make_model(), make_masker(share), limit)
    for size in (1, 2, 3):
        models = [make_model() for _ in range(size)]
        found = on_ranks(size, lambda world, m=models: measured(world, m[world.rank], make_masker(share), limit),
                         monkeypatch)  # fmt: skip
        assert all(one == found[0] for one in found), "ranks disagree"
        assert found[0] == pytest.approx(expected, rel=1e-5), size


def test_the_rows_at_once_do_not_matter() -> None:
    world = World(0, 1, torch.device("cpu"))
    found = [measured(world, make_model(), make_masker(0.5), batch=batch) for batch in (1, 7, 40)]
    assert all(one == pytest.approx(found[0], rel=1e-6) for one in found[1:])


def test_a_model_that_knows_frequencies_alone_uses_no_context() -> None:
    model = make_model()
    with torch.no_grad():
        model.bert.embeddings.word.weight.zero_()  # logits are the output's bias, whatever the row
        nn.init.normal_(model.bert.head.bias)
    found = measured(World(0, 1, torch.device("cpu")), model, make_masker())
    assert found["context_use"] == pytest.approx(0, abs=1e-6) and found["valid_loss"] > 3


def test_a_huge_loss_has_a_perplexity() -> None:
    model = make_model()
    with torch.no_grad():
        model.bert.head.bias[0] = 2000.0  # [PAD], which is never right
    found = measured(World(0, 1, torch.device("cpu")), model, make_masker())
    assert found["valid_loss"] > 1000 and found["valid_perplexity"] == math.exp(50)


@pytest.mark.parametrize("batches", [0, 2])
def test_a_request_to_stop_ends_it_without_an_answer(batches: int) -> None:
    """The engine is back in training, and no batch is begun."""
    model, asked = make_model(), []

    def stop() -> bool:
        asked.append(model.training)
        return len(asked) > batches

    world = World(0, 1, torch.device("cpu"))
    assert held_out(Engine(model), ROWS, make_masker(), 40, 6, world, stop) == {}  # type: ignore[arg-type]
    assert asked == [False] * (batches + 1) and model.training

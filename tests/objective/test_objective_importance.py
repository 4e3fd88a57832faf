"""The importance table against numpy in float64: its average, what it ignores, and that no split of a step shows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd.config import ModelConfig, ObjectiveConfig
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import TokenDropping
from sctd.objective.arms import ARMS
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from support import accumulate

VOCAB, SPECIAL, BETA = 40, (0, 1, 2, 3, 17), 0.995


def make(beta: float = BETA) -> ImportanceTable:
    return ImportanceTable(VOCAB, SPECIAL, beta)


def draw(seed: int, count: int = 64, high: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels with many duplicates (specials too) and their losses."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(high, (count,), generator=rng), torch.rand(count, generator=rng) * 15


def numpy_step(table: np.ndarray, labels: torch.Tensor, losses: torch.Tensor, beta: float) -> np.ndarray:
    after = table.copy()
    for token in set(labels.tolist()) - set(SPECIAL):
        after[token] = (
            beta * table[token] + (1 - beta) * losses.numpy().astype(np.float64)[labels.numpy() == token].mean()
        )
    return after


@pytest.mark.parametrize("beta", [0.995, 0.5, 0.0])
def test_average_with_duplicates_equals_numpy(beta: float) -> None:
    table, expected = make(beta), np.full(VOCAB, 10.0)
    for step in range(30):
        labels, losses = draw(step, count=30, high=22)
        assert len(set(labels.tolist())) <= 22 < len(labels)
        accumulate(table, labels, losses)
        table.commit(True)
        expected = numpy_step(expected, labels, losses, beta)
    np.testing.assert_allclose(table.scores_V.numpy(), expected, rtol=2e-6)


def test_start() -> None:
    table = make()
    assert table.scores_V.dtype == torch.float32 and bool((table.scores_V == 10.0).all())


def test_specials_and_absent_ids_never_move() -> None:
    table = make(beta=0.5)
    labels = torch.tensor([*SPECIAL, 20, 21, 21])
    for _ in range(5):
        accumulate(table, labels, torch.full((len(labels),), 2.0))
        table.commit(True)
    moved = (table.scores_V != 10.0).nonzero().flatten().tolist()
    assert moved == [20, 21]


def test_a_step_without_targets_changes_nothing() -> None:
    table = make()
    table.commit(True)
    assert bool((table.scores_V == 10.0).all())


def test_skipped_step_changes_nothing_and_forgets_its_sums() -> None:
    table, reference = make(), make()
    accumulate(table, *draw(1))
    table.commit(False)
    assert bool((table.scores_V == 10.0).all())
    for one in (table, reference):
        accumulate(one, *draw(2))
        one.commit(True)
    assert torch.equal(table.scores_V, reference.scores_V)


def test_sums_do_not_leak_into_the_next_step() -> None:
    table, expected = make(0.5), np.full(VOCAB, 10.0)
    for seed in (1, 2):
        accumulate(table, *draw(seed))
        table.commit(True)
        expected = numpy_step(expected, *draw(seed), 0.5)
    np.testing.assert_allclose(table.scores_V.numpy(), expected, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 96), max_size=7), shuffle=st.booleans())
def test_any_split_into_micro_batches_gives_the_same_bits(seed: int, cuts: list[int], shuffle: bool) -> None:
    whole, split = make(), make()
    for step in range(2):
        labels, losses = draw(seed + step, count=96, high=12)
        accumulate(whole, labels.view(8, 12), losses.view(8, 12))
        order = torch.randperm(96) if shuffle else torch.arange(96)
        edges = [0, *sorted(cuts), 96]
        for start, end in zip(edges, edges[1:], strict=False):
            accumulate(split, labels[order[start:end]], losses[order[start:end]])
        whole.commit(True), split.commit(True)
    assert torch.equal(whole.scores_V.view(torch.int32), split.scores_V.view(torch.int32))


def test_gradients_do_not_flow_into_the_table() -> None:
    table = make()
    losses = torch.rand(5, requires_grad=True)
    accumulate(table, torch.arange(20, 25), losses * 2)
    table.commit(True)
    assert not table.scores_V.requires_grad


def test_state_round_trip() -> None:
    table, other = make(), make()
    accumulate(table, *draw(1))
    table.commit(True)
    scores = table.scores_V.clone()
    accumulate(other, *draw(7))  # sums of an unfinished step do not survive a restore
    other.restore(scores)
    assert torch.equal(other.scores_V, table.scores_V)
    for one in (table, other):
        accumulate(one, *draw(2))
        one.commit(True)
    assert torch.equal(other.scores_V, table.scores_V)
    assert not torch.equal(scores, table.scores_V), "the saved scores moved along"


def test_it_survives_the_cast_of_its_module_and_moves_by_the_exact_amount() -> None:
    """A bfloat16 table would stall at 10.0: a step of 0.5 % rounds away."""
    torch.manual_seed(0)
    table = make()
    model = PretrainingModel(
        Bert(BertShape(VOCAB, 2, 16, 2, 32, 32, dropout=0.0, attention_dropout=0.0)),
        ARMS["sctd"].layer_plan(ModelConfig(layers=2)),
        ObjectiveConfig(),
        TokenDropping(VOCAB, (1, 2, 3, 17), 0),
        table,
    ).bfloat16()
    assert next(model.parameters()).dtype == torch.bfloat16 and model.importance is table
    assert table.scores_V.dtype == torch.float32 and bool((table.scores_V == 10.0).all())
    assert not [name for name in model.state_dict() if "importance" in name or "score" in name]
    batch = {
        "input_ids": torch.randint(4, 16, (2, 32)),
        "positions": torch.tensor([[3], [4]]),
        "labels": torch.tensor([[20], [21]]),
        "row_seed": torch.arange(2),
    }
    _, parts = model(**batch, phase=Phase.DROP, keep=16)
    table.commit(True)
    assert table.scores_V.dtype == torch.float32
    moved = table.scores_V[[20, 21]].double()
    untouched = torch.ones(VOCAB, dtype=torch.bool)
    untouched[[20, 21]] = False
    assert bool((table.scores_V[untouched] == 10.0).all())
    expected = 0.995 * 10.0 + 0.005 * float(parts["mlm_drop"])
    assert float(moved.mean()) == pytest.approx(expected, rel=3e-7) and expected < 9.99


def test_half_precision_losses_are_averaged_exactly() -> None:
    """1000 equal bfloat16 losses: a bfloat16 sum would stop growing at 256 times the value."""
    table = make(beta=0.0)
    accumulate(table, torch.full((1000,), 30), torch.full((1000,), 1.0078125).bfloat16())
    table.commit(True)
    assert float(table.scores_V[30]) == 1.0078125


def test_a_new_table_is_measured_as_the_mean_of_the_steps_that_an_id_occurs_in() -> None:
    """Whenever it first occurs; what does not occur ranks with the most important tenth, and special ids stay."""
    table = ImportanceTable(VOCAB, SPECIAL, BETA, measures=True)
    found: dict[int, list[float]] = {}
    for step in range(20):
        labels, losses = draw(step, count=12, high=30)
        for token in set(labels.tolist()) - set(SPECIAL):
            found.setdefault(token, []).append(float(losses[labels == token].double().mean()))
        accumulate(table, labels, losses)
        table.commit(True, measuring=True)
    means = {token: sum(each) / len(each) for token, each in found.items()}
    assert len(means) > 15 and len({len(each) for each in found.values()}) > 3
    for token, mean in means.items():
        assert table.scores_V[token] == pytest.approx(mean, abs=1e-4), token
    accumulate(table, torch.tensor([35]), torch.tensor([3.0]))
    table.commit(False, measuring=True)  # a skipped step measures nothing
    table.end_measuring()
    level = np.quantile(list(means.values()), 0.9)
    for token in set(range(VOCAB)) - means.keys():
        assert table.scores_V[token] == (10.0 if token in SPECIAL else pytest.approx(level, abs=1e-4)), token

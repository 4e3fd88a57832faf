"""How strongly the alignment acts: the ratio of two gradients, which leaves no trace in the training."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sctd.config import FAMILIES, ModelConfig, ObjectiveConfig
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import TokenDropping
from sctd.objective.arms import ARMS
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd.train.loop.alignment import kl_gradient

VOCAB, LENGTH, KEEP = 70, 32, 16
both = pytest.mark.parametrize("family", FAMILIES)


def make_model(
    family: str = "bert", dropout: float = 0.0, recompute: bool = False, **objective: Any
) -> PretrainingModel:
    torch.manual_seed(0)
    shape = BertShape(VOCAB, 4, 32, 2, 64, LENGTH, dropout, dropout, initializer_range=0.2, family=family)
    cfg = ObjectiveConfig(**objective)
    dropping, table = TokenDropping(VOCAB, (1, 2, 3, 4), 0), ImportanceTable(VOCAB, (0, 1, 2, 3, 4), 0.9)
    plan, aligns = ARMS["sctd"].layer_plan(ModelConfig(layers=4)), ARMS["sctd"].needs_full_path(cfg)
    return PretrainingModel(Bert(shape, recompute=recompute), plan, cfg, dropping, table, aligns)


def make_batch(rows: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(5, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = 2, 3
    positions = torch.arange(1, 11).expand(rows, 10).contiguous()
    return {
        "input_ids": ids.scatter(1, positions, 4),
        "positions": positions,
        "labels": ids.gather(1, positions),
        "row_seed": torch.arange(rows),
    }


def gradient(model: PretrainingModel, batch: dict[str, Tensor], **switches: Any) -> float:
    """Norm of the gradient of an ALIGN step with these terms, by a backward of its own."""
    model.objective = replace(model.objective, **switches)
    model.zero_grad()
    model(**batch, phase=Phase.ALIGN, keep=KEEP)[0].backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@both
@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"kl_weight": 3.0},
        {"kl_local": False},
        {"kl_global": False},
        {"mlm_full": False},
        {"mlm_drop": False},
        {"semantic_positions": "all"},
        {"detach_teacher": False},
    ],
    ids=str,
)
def test_it_is_the_ratio_of_two_backwards(objective: dict[str, Any], family: str) -> None:
    batch = make_batch()
    found = kl_gradient(make_model(family, **objective), batch, KEEP)
    semantic = gradient(make_model(family, **objective), batch, mlm_drop=False, mlm_full=False)
    mlm = gradient(make_model(family, **objective), batch, kl_global=False, kl_local=False)
    assert found == pytest.approx(semantic / mlm, rel=1e-4) and found > 1e-5


@both
def test_it_grows_with_lambda(family: str) -> None:
    zero, one, two = (
        kl_gradient(make_model(family, kl_weight=weight), make_batch(), KEEP) for weight in (0.0, 1.0, 2.0)
    )
    assert zero == 0.0 and one > 0.0 and two == pytest.approx(2 * one, rel=1e-4)


def test_all_kept_has_next_to_nothing_to_align() -> None:
    assert kl_gradient(make_model(kl_weight=1.0), make_batch(), LENGTH) < 1e-3 * kl_gradient(
        make_model(kl_weight=1.0), make_batch(), KEEP
    )


@pytest.mark.parametrize("objective", [{"kl_global": False, "kl_local": False}, {"mlm_drop": False, "mlm_full": False}])
def test_without_one_of_the_two_there_is_nothing_to_tell(objective: dict[str, bool]) -> None:
    assert kl_gradient(make_model(**objective), make_batch(), KEEP) is None


def test_where_no_rank_holds_whole_parameters_there_is_nothing_to_tell() -> None:
    model = make_model()
    next(model.parameters()).ds_id = 0  # ZeRO-3's mark
    assert kl_gradient(model, make_batch(), KEEP) is None


def test_the_first_rows_are_enough() -> None:
    found = [kl_gradient(make_model(), {k: v[:rows] for k, v in make_batch(20).items()}, KEEP) for rows in (8, 20, 7)]
    assert found[0] == found[1] != found[2]


@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_it_leaves_no_trace(training: bool, recompute: bool, family: str) -> None:
    """Gradients that wait for the step, sums of the table, mode and random numbers stay; no dropout acts."""
    model, batch = make_model(family, dropout=0.3, recompute=recompute), make_batch()
    model(**batch, phase=Phase.ALIGN, keep=KEEP)[0].backward()
    model.train(training)
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    sums, scores, state = model.importance.sum_count_2V.clone(), model.importance.scores_V, torch.get_rng_state()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    assert int(sums[1].sum()) == 30
    found = kl_gradient(model, batch, KEEP)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == kl_gradient(make_model(family), batch, KEEP)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(p, weight) for p, weight in zip(model.parameters(), weights, strict=True))
    assert torch.equal(model.importance.sum_count_2V, sums) and model.importance.scores_V is scores
    assert {module.training for module in model.modules()} == {training}


def test_a_failure_leaves_the_model_in_training() -> None:
    model, batch = make_model().train(), make_batch()
    with pytest.raises(ValueError, match="out of range"):
        kl_gradient(model, batch | {"positions": batch["positions"] + LENGTH}, KEEP)
    assert model.training

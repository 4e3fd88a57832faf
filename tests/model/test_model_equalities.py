"""Paths that must be the same: K = S and the baseline, bit for bit; the short last layer and the whole one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sctd.config import ModelConfig, ObjectiveConfig
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import TokenDropping, kept_tokens
from sctd.objective.arms import ARMS
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase

VOCAB, SPECIAL = 300, (0, 1, 2, 3, 4)
SHAPE = BertShape(VOCAB, 4, 64, 4, 128, 64, dropout=0.0, attention_dropout=0.0)


def make_model(layers: int = 4, per_layer: bool = False, **objective: object) -> PretrainingModel:
    torch.manual_seed(0)
    bert = Bert(replace(SHAPE, layers=layers, initializer_range=0.2))
    plan = ARMS["sctd"].layer_plan(ModelConfig(layers=layers))
    table = None if per_layer else ImportanceTable(VOCAB, SPECIAL, 0.995)
    dropping = TokenDropping(VOCAB, (2, 3, 4, 1), 0, per_layer)
    return PretrainingModel(bert, plan, ObjectiveConfig(**objective), dropping, table)


def make_batch(length: int = 48, rows: int = 4, targets: int = 7) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCAB, (rows, length), generator=rng)
    ids[:, 0], ids[:, -1] = 2, 3
    positions = torch.stack(
        [torch.randperm(length - 2, generator=rng)[:targets].sort().values + 1 for _ in range(rows)]
    )
    labels = ids.gather(1, positions)
    return {
        "input_ids": ids.scatter(1, positions, 4),
        "positions": positions,
        "labels": labels,
        "row_seed": torch.randint(2**62, (rows,), generator=rng),
    }


def run(model: PretrainingModel, batch: dict[str, Tensor], phase: Phase, keep: int = 0):
    model.zero_grad()
    loss, parts = model(**batch, phase=phase, keep=keep)
    loss.backward()
    return loss.detach(), parts, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("length", [64, 48, 23])
@pytest.mark.parametrize("layers", [2, 4, 6])
def test_all_kept_is_the_baseline_bit_for_bit(layers: int, length: int) -> None:
    model, batch = make_model(layers), make_batch(length)
    full, _, full_grads = run(model, batch, Phase.FULL)
    drop, parts, drop_grads = run(model, batch, Phase.DROP, kept_tokens(1.0, length))
    assert torch.equal(drop, full) and torch.equal(parts["mlm_drop"], full)
    for name, grad in full_grads.items():
        assert grad.abs().max() > 0 and torch.equal(drop_grads[name], grad), name


def test_all_kept_is_the_baseline_for_random_ltd() -> None:
    model, batch = make_model(per_layer=True), make_batch(32)
    full, _, full_grads = run(model, batch, Phase.FULL)
    drop, _, drop_grads = run(model, batch, Phase.DROP, 32)
    assert torch.equal(drop, full)
    assert all(torch.equal(drop_grads[name], grad) for name, grad in full_grads.items())


def test_half_kept_is_not_the_baseline() -> None:
    model, batch = make_model(), make_batch()
    full, _, _ = run(model, batch, Phase.FULL)
    drop, _, _ = run(model, batch, Phase.DROP, 16)
    assert abs(float(drop - full)) > 1e-4


def test_all_kept_has_nothing_to_align() -> None:
    loss, parts, _ = run(make_model(kl_weight=1.0), make_batch(), Phase.ALIGN, 48)
    assert float(parts["kl_global"]) == pytest.approx(0, abs=1e-6)
    assert float(parts["kl_local"]) == pytest.approx(0, abs=1e-6)
    assert torch.equal(parts["mlm_drop"], parts["mlm_full"])


@pytest.mark.parametrize("phase", list(Phase))
def test_short_last_layer_loses_nothing(phase: Phase) -> None:
    """`all` computes the last layer in full. Without KL, only the shape of the computation differs."""
    batch = make_batch()
    losses, grads = {}, {}
    for where in ("cls", "all"):
        model = make_model(semantic_positions=where, kl_weight=0.0).double()
        losses[where], _, grads[where] = run(model, batch, phase, 16)
    torch.testing.assert_close(losses["cls"], losses["all"], rtol=1e-6, atol=0)
    for name, grad in grads["all"].items():
        torch.testing.assert_close(grads["cls"][name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()), msg=name)


def test_last_layer_computes_only_what_is_looked_at() -> None:
    """[CLS] and the targets are the queries; keys and values come from all positions."""
    for where, queries in (("cls", 1 + 7), ("all", 48)):
        model, seen = make_model(semantic_positions=where), []
        model.bert.layers[-1].attention.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append((args[0].shape[1], args[1].shape[1]))
        )
        model(**make_batch(), phase=Phase.ALIGN, keep=16)
        assert seen == [(queries, 48)] * 2


def test_logits_are_computed_at_targets_only() -> None:
    model, seen = make_model(semantic_positions="all"), []
    model.bert.head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model(**make_batch(), phase=Phase.FULL)
    assert seen == [(4 * 7, VOCAB)]


def test_trunk_and_first_dropped_layer_run_once_in_an_align_step() -> None:
    model = make_model(layers=6)
    calls = [0] * 6
    for number, layer in enumerate(model.bert.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    model(**make_batch(), phase=Phase.ALIGN, keep=16)
    assert calls == [1, 1, 1, 2, 2, 2]

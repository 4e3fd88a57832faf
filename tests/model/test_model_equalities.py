"""Paths that must be the same: K = S and the baseline, bit for bit; the short last layer and the whole one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sctd.config import FAMILIES, ModelConfig, ObjectiveConfig
from sctd.model import attention
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import TokenDropping, kept_tokens
from sctd.objective.arms import ARMS
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd_kernels import gather_rows, rotate

VOCAB, SPECIAL = 300, (0, 1, 2, 3, 4)
SHAPE = BertShape(VOCAB, 4, 64, 4, 128, 64, dropout=0.0, attention_dropout=0.0)
both = pytest.mark.parametrize("family", FAMILIES)


def make_model(
    layers: int = 4, per_layer: bool = False, family: str = "bert", dropout: float = 0.0, **objective: object
) -> PretrainingModel:
    torch.manual_seed(0)
    bert = Bert(replace(SHAPE, layers=layers, initializer_range=0.2, family=family, dropout=dropout))
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


@both
@pytest.mark.parametrize("length", [64, 48, 23])
@pytest.mark.parametrize("layers", [2, 4, 6])
def test_all_kept_is_the_baseline_bit_for_bit(layers: int, length: int, family: str) -> None:
    """With the dropout of a whole row, since that goes by place in the row."""
    model, batch = make_model(layers, family=family, dropout=0.1), make_batch(length)
    full, _, full_grads = run(model, batch, Phase.FULL)
    drop, parts, drop_grads = run(model, batch, Phase.DROP, kept_tokens(1.0, length))
    assert torch.equal(drop, full) and torch.equal(parts["mlm_drop"], full)
    for name, grad in full_grads.items():
        assert grad.abs().max() > 0 and torch.equal(drop_grads[name], grad), name


@both
def test_all_kept_is_the_baseline_for_random_ltd(family: str) -> None:
    model, batch = make_model(per_layer=True, family=family), make_batch(32)
    full, _, full_grads = run(model, batch, Phase.FULL)
    drop, _, drop_grads = run(model, batch, Phase.DROP, 32)
    assert torch.equal(drop, full)
    assert all(torch.equal(drop_grads[name], grad) for name, grad in full_grads.items())


@both
@pytest.mark.parametrize("per_layer", [False, True])
def test_half_kept_is_not_the_baseline(per_layer: bool, family: str) -> None:
    model, batch = make_model(per_layer=per_layer, family=family), make_batch()
    full, _, _ = run(model, batch, Phase.FULL)
    drop, _, _ = run(model, batch, Phase.DROP, 16)
    assert abs(float(drop - full)) > 1e-4


@both
def test_all_kept_has_nothing_to_align(family: str) -> None:
    loss, parts, _ = run(make_model(kl_weight=1.0, family=family), make_batch(), Phase.ALIGN, 48)
    assert float(parts["kl_global"]) == pytest.approx(0, abs=1e-6)
    assert float(parts["kl_local"]) == pytest.approx(0, abs=1e-6)
    assert torch.equal(parts["mlm_drop"], parts["mlm_full"])


@both
@pytest.mark.parametrize("phase", list(Phase))
def test_short_last_layer_loses_nothing(phase: Phase, family: str) -> None:
    """`all` computes the last layer in full. Without KL, only the shape of the computation differs."""
    batch = make_batch()
    losses, grads = {}, {}
    for where in ("cls", "all"):
        model = make_model(semantic_positions=where, kl_weight=0.0, family=family).double()
        losses[where], _, grads[where] = run(model, batch, phase, 16)
    torch.testing.assert_close(losses["cls"], losses["all"], rtol=1e-6, atol=0)
    for name, grad in grads["all"].items():
        torch.testing.assert_close(grads["cls"][name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()), msg=name)


@both
def test_last_layer_computes_only_what_is_looked_at(family: str) -> None:
    """[CLS] and the targets are the queries; keys and values come from all positions."""
    for where, queries in (("cls", 1 + 7), ("all", 48)):
        model, seen = make_model(semantic_positions=where, family=family), []
        model.bert.layers[-1].attention.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(
                (args[0].shape[1], (args[0] if args[1] is None else args[1]).shape[1])
            )
        )
        model(**make_batch(), phase=Phase.ALIGN, keep=16)
        assert seen == [(queries, 48)] * 2


def test_logits_are_computed_at_targets_only() -> None:
    model, seen = make_model(semantic_positions="all"), []
    model.bert.head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model(**make_batch(), phase=Phase.FULL)
    assert seen == [(4 * 7, VOCAB)]


@both
def test_trunk_and_first_dropped_layer_run_once_in_an_align_step(family: str) -> None:
    model = make_model(layers=6, family=family)
    calls = [0] * 6
    for number, layer in enumerate(model.bert.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    model(**make_batch(), phase=Phase.ALIGN, keep=16)
    assert calls == [1, 1, 1, 2, 2, 2]


# ---- places


Turned = list[tuple[Tensor, Tensor]]  # what goes into each rotation, and what comes out


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> Turned:
    calls: Turned = []

    def watched(x_BTHd: Tensor, *rest: Tensor | None) -> Tensor:
        calls.append((x_BTHd, rotate(x_BTHd, *rest)))
        return calls[-1][1]

    monkeypatch.setattr(attention, "rotate", watched)
    return calls


def kept_positions(model: PretrainingModel, batch: dict[str, Tensor], keep: int) -> Tensor:
    """(B, K), by which rows of its input the first dropped layer gets for queries."""
    seen: list[Tensor] = []
    first = model.bert.layers[model.plan.first_dropped]
    with first.register_forward_hook(lambda module, args, out: seen.extend(args[:2])):
        model(**batch, phase=Phase.DROP, keep=keep)
    kept, context = seen
    is_same = (kept[:, :, None] == context[:, None]).all(-1)
    assert is_same.sum(-1).unique().tolist() == [1]
    return is_same.int().argmax(-1)


def test_kept_tokens_turn_by_their_places_in_the_row(turned: Turned) -> None:
    """Queries and keys of all dropped layers are rotated as in a row that holds all tokens."""
    model, batch = make_model(6, family="modernbert"), make_batch()
    table_2Sh = model.bert.layers[0].attention.rotary.table_2Sh
    kept = kept_positions(model, batch, 16)
    assert bool((kept != torch.arange(16)).any(1).all()) and len(kept.unique(dim=0)) == 4
    turned.clear()
    model(**batch, phase=Phase.DROP, keep=16)
    drop, tokens = turned.copy(), [x.shape[1] for x, _ in turned]
    assert tokens == [48, 48, 48, 48, 16, 48, 16, 16, 16, 16, 8, 48]  # queries, keys of each layer
    for x, out in drop[4:10]:
        if x.shape[1] == 16:  # back where they stood in the row
            where = kept[:, :, None, None].expand(x.shape)
            whole = torch.zeros(4, 48, *x.shape[2:]).scatter(1, where, x)
            assert torch.equal(rotate(whole, table_2Sh).gather(1, where), out)
        else:
            assert torch.equal(rotate(x, table_2Sh), out)
    turned.clear()
    model(**batch, phase=Phase.FULL)
    (_, queries), (_, keys) = turned[4:6]  # of the first dropped layer, whose input is the same on the full path
    torch.testing.assert_close(drop[4][1], gather_rows(queries.flatten(2), kept).view(drop[4][1].shape))
    torch.testing.assert_close(drop[5][1], keys)


def test_targets_turn_by_their_places_in_the_last_layer(turned: Turned) -> None:
    model, batch = make_model(family="modernbert"), make_batch()
    found = {}
    for where in ("cls", "all"):
        turned.clear()
        model.objective = ObjectiveConfig(semantic_positions=where)
        model(**batch, phase=Phase.FULL)
        found[where] = turned[-2][1]
    outputs = torch.cat([torch.zeros(4, 1, dtype=torch.long), batch["positions"]], 1)
    torch.testing.assert_close(found["cls"], gather_rows(found["all"].flatten(2), outputs).view(found["cls"].shape))


def test_random_ltd_turns_each_layers_subset_by_its_own_places(turned: Turned) -> None:
    """A position whose neighbours are all dropped keeps its angle: the pass over one kept subset is the masked row."""
    model, batch = make_model(6, per_layer=True, family="modernbert"), make_batch()
    table_2Sh, inputs = model.bert.layers[0].attention.rotary.table_2Sh, []
    for layer in model.bert.layers[model.plan.middle]:
        layer.register_forward_hook(lambda module, args, out: inputs.append(args[4]))
    model(**batch, phase=Phase.DROP, keep=16)
    assert len(inputs) == 3 and len(torch.cat(inputs).unique(dim=0)) == 12
    for place, (queries, keys) in zip(inputs, zip(turned[4:10:2], turned[5:10:2], strict=True), strict=True):
        for x, out in (queries, keys):
            where = place[:, :, None, None].expand(x.shape)
            whole = torch.zeros(4, 48, *x.shape[2:]).scatter(1, where, x)
            assert torch.equal(rotate(whole, table_2Sh).gather(1, where), out)

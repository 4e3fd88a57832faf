"""Every path of the model against slow code that loops over rows, heads and queries, as method.md section 1 says it.

A modernbert is told from a bert by its weights: it has no table of positions, and what has no weight is not there.

The oracle takes nothing from the product but the weights: it selects with a sort in plain Python, computes attention
query by query over explicit lists of keys, runs the last layer in full and ALIGN's two paths one after the other with
a trunk each. All in float64; only the losses of the product are float32.
"""

import math
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

VOCAB, D, HEADS, PAD, UNK, CLS, SEP, MASK, SPECIALS = 60, 12, 3, 0, 1, 2, 3, 4, 5
LENGTH, THETA = 16, 10_000.0
Weights = dict[str, Tensor]
both = pytest.mark.parametrize("family", FAMILIES)


# ---- the oracle


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    if f"{name}.weight" not in weights:
        return x
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return centred / scale * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def is_modern(weights: Weights) -> bool:
    return "bert.embeddings.position.weight" not in weights


def turn(x: Tensor, place: int) -> Tensor:
    """One head of one token: column i with column i + d/2, by place x theta**(-2i/d)."""
    half = len(x) // 2
    angles = [place * THETA ** (-2 * i / len(x)) for i in range(half)]
    first = [x[i] * math.cos(a) - x[i + half] * math.sin(a) for i, a in enumerate(angles)]
    second = [x[i + half] * math.cos(a) + x[i] * math.sin(a) for i, a in enumerate(angles)]
    return torch.stack(first + second)


def turned(weights: Weights, x: Tensor, places: list[int]) -> Tensor:
    """All heads of all tokens (T, D)."""
    if not is_modern(weights):
        return x
    size = D // HEADS
    rows = [torch.cat([turn(x[t, h * size : (h + 1) * size], place) for h in range(HEADS)]) for t, place in
            enumerate(places)]  # fmt: skip
    return torch.stack(rows)


def layer_row(
    weights: Weights, number: int, queries: Tensor, keys: Tensor, query_places: list[int], key_places: list[int]
) -> Tensor:
    """One layer for one row: (Q, D) attending to (K, D)."""
    name, size, modern = f"bert.layers.{number}", D // HEADS, is_modern(weights)
    before = f"{name}.attention_norm" if modern else ""
    q = turned(weights, linear(weights, f"{name}.attention.query", norm(weights, before, queries)), query_places)
    key_value = linear(weights, f"{name}.attention.key_value", norm(weights, before, keys))
    k, v = turned(weights, key_value[:, :D], key_places), key_value[:, D:]
    mixed = []
    for i in range(len(queries)):
        parts = []
        for head in range(HEADS):
            span = slice(head * size, (head + 1) * size)
            logits = torch.stack([q[i, span] @ k[j, span] for j in range(len(keys))]) / math.sqrt(size)
            share = logits.exp() / logits.exp().sum()
            parts.append(sum(share[j] * v[j, span] for j in range(len(keys))))
        mixed.append(torch.cat(parts))
    x = queries + linear(weights, f"{name}.attention.out", torch.stack(mixed))
    if modern:
        inner = linear(weights, f"{name}.expand", norm(weights, f"{name}.output_norm", x))
        half = inner.shape[1] // 2
        return x + linear(weights, f"{name}.contract", gelu(inner[:, :half]) * inner[:, half:])
    x = norm(weights, f"{name}.attention_norm", x)
    inner = gelu(linear(weights, f"{name}.expand", x))
    return norm(weights, f"{name}.output_norm", x + linear(weights, f"{name}.contract", inner))


def fmix32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def kept_positions(ids: list[int], table: list[float], seed: int, keep: int) -> list[int]:
    def rank(position: int) -> tuple[int, float, int]:
        token = ids[position]
        grade = -1 if token == PAD else int(token in (CLS, SEP, MASK, UNK))
        tie = fmix32(fmix32(position + seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF))
        return grade, 0.0 if grade else table[token], tie

    return sorted(sorted(range(len(ids)), key=rank)[len(ids) - keep :])


def embed_row(weights: Weights, ids: list[int]) -> Tensor:
    rows = []
    for position, token in enumerate(ids):
        x = weights["bert.embeddings.word.weight"][token]
        if not is_modern(weights):
            x = x + weights["bert.embeddings.position.weight"][position]
            x = x + weights["bert.embeddings.token_type.weight"][0]
        rows.append(x)
    return norm(weights, "bert.embeddings.norm", torch.stack(rows))


def path_row(weights: Weights, layers: int, first: int, tail: int, ids: list[int], kept: list[int] | None):
    """(X_{l-1}, X_l) of one row as the next module reads them, the last layer in full. kept: None for the full path."""
    x, all_places = embed_row(weights, ids), list(range(len(ids)))
    for number in range(first):
        x = layer_row(weights, number, x, x, all_places, all_places)
    if kept is None:
        for number in range(first, layers - tail):
            x = layer_row(weights, number, x, x, all_places, all_places)
    else:
        y = layer_row(weights, first, torch.stack([x[s] for s in kept]), x, kept, all_places)
        for number in range(first + 1, layers - tail):
            y = layer_row(weights, number, y, y, kept, kept)
        x = torch.stack([y[kept.index(s)] if s in kept else x[s] for s in range(len(ids))])
    for number in range(layers - tail, layers - 1):
        x = layer_row(weights, number, x, x, all_places, all_places)
    last = norm(weights, "bert.norm", layer_row(weights, layers - 1, x, x, all_places, all_places))
    return norm(weights, f"bert.layers.{layers - 1}.attention_norm" if is_modern(weights) else "", x), last


def token_loss(weights: Weights, state: Tensor, label: int) -> Tensor:
    x = norm(weights, "bert.head.norm", gelu(linear(weights, "bert.head.dense", state)))
    logits = weights["bert.embeddings.word.weight"] @ x + weights["bert.head.bias"]
    return torch.log(logits.exp().sum()) - logits[label]


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    p, q = (x.exp() / x.exp().sum() for x in (teacher, student))
    return (p * (p / q).log()).sum()


def oracle(model: PretrainingModel, batch: dict[str, Tensor], phase: Phase, keep: int) -> tuple[Tensor, list[Any]]:
    """The loss of a micro-batch as method.md defines it, and the (label, loss) pairs that feed the table: those of the
    dropping path where there is one, else of the full path."""
    weights, cfg = dict(model.named_parameters()), model.objective
    table = [float(x) for x in model.importance.scores_V]
    layers, first, tail = model.plan.layers, model.plan.first_dropped, model.plan.full_tail
    drop_mlm, full_mlm, kl_global, kl_local, pairs = [], [], [], [], []
    for b, ids in enumerate(batch["input_ids"].tolist()):
        targets = list(zip(batch["positions"][b].tolist(), batch["labels"][b].tolist(), strict=True))
        if phase is not Phase.FULL:
            kept = kept_positions(ids, table, int(batch["row_seed"][b]), keep)
            drop_before, drop_last = path_row(weights, layers, first, tail, ids, kept)
            drop_mlm += [token_loss(weights, drop_last[s], label) for s, label in targets]
        if phase is not Phase.DROP:
            full_before, full_last = path_row(weights, layers, first, tail, ids, None)
            full_mlm += [token_loss(weights, full_last[s], label) for s, label in targets]
        fed = full_mlm if phase is Phase.FULL else drop_mlm
        pairs += [(label, fed[-len(targets) + m].item()) for m, (_, label) in enumerate(targets)]
        if phase is Phase.ALIGN:
            where = [0] if cfg.semantic_positions == "cls" else range(len(ids))
            for s in where:
                teachers = full_last[s], full_before[s]
                if cfg.detach_teacher:
                    teachers = tuple(teacher.detach() for teacher in teachers)
                kl_global.append(kl(teachers[0], drop_last[s]))
                kl_local.append(kl(teachers[1], drop_before[s]))

    def mean(values: list[Tensor]) -> Tensor:
        return sum(values) / len(values)

    if phase is Phase.FULL:
        return mean(full_mlm), pairs
    if phase is Phase.DROP:
        return mean(drop_mlm), pairs
    loss = (mean(drop_mlm) + mean(full_mlm)) / 2
    return loss + cfg.kl_weight * (mean(kl_global) + mean(kl_local)), pairs


# ---- the comparison


def make_model(layers: int, objective: ObjectiveConfig, family: str = "bert", **plan: int) -> PretrainingModel:
    torch.manual_seed(0)
    bert = Bert(BertShape(VOCAB, layers, D, HEADS, 20, LENGTH, dropout=0.0, attention_dropout=0.0, family=family))
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    table = ImportanceTable(VOCAB, (PAD, UNK, CLS, SEP, MASK), 0.995)
    table.scores_V = torch.randint(0, 8, (VOCAB,)).float()  # ties within and between words
    arm = ARMS["sctd"]
    layer_plan = arm.layer_plan(ModelConfig(layers=layers, **plan))
    dropping = TokenDropping(VOCAB, (CLS, SEP, MASK, UNK), PAD)
    return PretrainingModel(bert.double(), layer_plan, objective, dropping, table)


def make_batch(rows: int = 2, length: int = 11, targets: int = 3) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCAB, (rows, length), generator=rng)
    ids[:, 0], ids[:, -1], ids[0, 4] = CLS, SEP, UNK
    positions = torch.stack(
        [torch.randperm(length - 2, generator=rng)[:targets].sort().values + 1 for _ in range(rows)]
    )
    labels = ids.gather(1, positions)
    ids.scatter_(1, positions[:, :2], MASK)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=rng)
    return {"input_ids": ids, "positions": positions, "labels": labels, "row_seed": seeds}


def assert_same(model: PretrainingModel, batch: dict[str, Tensor], phase: Phase, keep: int) -> None:
    parameters = dict(model.named_parameters())
    loss, parts = model(**batch, phase=phase, keep=keep)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    expected, pairs = oracle(model, batch, phase, keep)
    expected_grads = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert parts["loss"].item() == loss.item() and not parts["loss"].requires_grad
    for name, ours, theirs in zip(parameters, grads, expected_grads, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6 * float(theirs.abs().max()) + 1e-9, msg=name)
    before = model.importance.scores_V
    model.importance.commit(True)
    assert bool((model.importance.scores_V != before).any())
    torch.testing.assert_close(model.importance.scores_V.double(), moved(before, pairs), rtol=1e-6, atol=1e-6)


def moved(before: Tensor, pairs: list[tuple[int, float]]) -> Tensor:
    """The table after a step: each id that is not special moves by the mean loss of its targets."""
    after = before.double().clone()
    for token in range(SPECIALS, VOCAB):
        losses = [loss for label, loss in pairs if label == token]
        if losses:
            after[token] = 0.995 * after[token] + 0.005 * sum(losses) / len(losses)
    return after


@both
@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("layers", [4, 6])
def test_each_phase(phase: Phase, layers: int, family: str) -> None:
    assert_same(make_model(layers, ObjectiveConfig(), family), make_batch(), phase, keep=6)


@both
@pytest.mark.parametrize("keep", [1, 4, 11])
def test_few_kept_and_all_kept(keep: int, family: str) -> None:
    assert_same(make_model(4, ObjectiveConfig(), family), make_batch(), Phase.DROP, keep)


@both
def test_two_layers_have_no_trunk(family: str) -> None:
    assert_same(make_model(2, ObjectiveConfig(), family), make_batch(), Phase.ALIGN, keep=6)


@both
def test_longer_tail(family: str) -> None:
    model = make_model(4, ObjectiveConfig(), family, first_dropped=0, full_tail=2)
    assert_same(model, make_batch(), Phase.ALIGN, keep=5)


@pytest.mark.parametrize(
    ("positions", "detach", "family"),
    [
        ("cls", True, "bert"),
        ("cls", False, "bert"),
        ("all", True, "bert"),
        ("all", False, "bert"),
        ("cls", False, "modernbert"),
        ("all", True, "modernbert"),
    ],
)
def test_alignment_options(positions: str, detach: bool, family: str) -> None:
    objective = ObjectiveConfig(kl_weight=3.0, semantic_positions=positions, detach_teacher=detach)
    assert_same(make_model(4, objective, family), make_batch(), Phase.ALIGN, keep=5)


def test_pads_in_a_row_are_dropped_first() -> None:
    batch = make_batch()
    batch["input_ids"][:, 5] = PAD
    batch["positions"], batch["labels"] = (x[:, :1] for x in (batch["positions"], batch["labels"]))
    assert_same(make_model(4, ObjectiveConfig()), batch, Phase.DROP, keep=10)


@both
def test_the_oracle_tells_paths_apart(family: str) -> None:
    """What the tests above compare is not one and the same number."""
    model, batch = make_model(4, ObjectiveConfig(), family), make_batch()
    losses = {phase: oracle(model, batch, phase, 6)[0].item() for phase in Phase}
    assert len({round(loss, 4) for loss in losses.values()}) == 3
    assert abs(oracle(model, batch, Phase.DROP, 5)[0].item() - losses[Phase.DROP]) > 1e-4
    model.plan = replace(model.plan, first_dropped=0)
    assert abs(oracle(model, batch, Phase.DROP, 6)[0].item() - losses[Phase.DROP]) > 1e-4


def test_the_oracle_hears_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept tokens that turned as if they stood side by side would give another loss."""
    model, batch = make_model(4, ObjectiveConfig(), "modernbert"), make_batch()
    loss = oracle(model, batch, Phase.DROP, 6)[0].item()
    real = turned
    monkeypatch.setitem(globals(), "turned", lambda weights, x, places: real(weights, x, list(range(len(places)))))
    assert abs(oracle(model, batch, Phase.DROP, 6)[0].item() - loss) > 1e-4

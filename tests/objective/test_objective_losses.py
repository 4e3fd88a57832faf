"""The loss of each phase: its terms, their switches and weights, and where gradients flow."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sctd.config import ARMS as ARM_NAMES
from sctd.config import FAMILIES, ModelConfig, ObjectiveConfig, config_from_dict
from sctd.corpus.tokenizer import SpecialIds
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import TokenDropping
from sctd.objective.arms import ARMS, KeepBy
from sctd.objective.build import build_model
from sctd.objective.importance import ImportanceTable
from sctd.objective.pretraining import PretrainingModel, hidden_kl
from sctd.objective.schedule import Phase
from support import accumulate

VOCAB, LENGTH, KEEP, TARGETS, PAD, CLS, MASK = 90, 32, 16, 5, 0, 2, 4
Grads = dict[str, Tensor]
both = pytest.mark.parametrize("family", FAMILIES)


def make_model(arm: str = "sctd", layers: int = 4, family: str = "bert", **objective: Any) -> PretrainingModel:
    torch.manual_seed(0)
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.2}
    bert = Bert(BertShape(VOCAB, layers, 32, 2, 64, LENGTH, **rates, family=family))
    if family == "modernbert":  # a norm before a loss must not look like none
        for name, parameter in bert.named_parameters():
            if "norm" in name:
                parameter.data += 0.5 * torch.randn_like(parameter)
    cfg = ObjectiveConfig(**objective)
    return PretrainingModel(
        bert.double(),
        ARMS[arm].layer_plan(ModelConfig(layers=layers)),
        cfg,
        TokenDropping(VOCAB, (2, 3, 4, 1), PAD) if ARMS[arm].drops else None,
        ImportanceTable(VOCAB, (0, 1, 2, 3, 4), 0.995),
        ARMS[arm].needs_full_path(cfg),
    )


def make_batch(rows: int = 3) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCAB, (rows, LENGTH), generator=rng)
    ids[:, 0], ids[:, -1] = CLS, 3
    positions = torch.stack(
        [torch.randperm(LENGTH - 2, generator=rng)[:TARGETS].sort().values + 1 for _ in range(rows)]
    )
    return {
        "labels": ids.gather(1, positions),
        "input_ids": ids.scatter(1, positions, MASK),
        "positions": positions,
        "row_seed": torch.randint(2**62, (rows,), generator=rng),
    }


def run(model: PretrainingModel, batch: dict[str, Tensor], phase: Phase) -> tuple[Tensor, dict[str, Tensor], Grads]:
    model.zero_grad(set_to_none=True)
    loss, parts = model(**batch, phase=phase, keep=KEEP)
    loss.backward()
    return loss.detach(), parts, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_grads(found: Grads, expected: Grads) -> None:
    """Losses are float32; in a modernbert their rounding reaches each layer by more ways."""
    assert set(found) == set(expected)
    slack = 5e-6 if "bert.norm.weight" in expected else 1e-6
    for name, grad in expected.items():
        atol = slack * float(grad.abs().max()) + 1e-9
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


# ---- the formulas


def numpy_kl(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """KL(softmax(teacher) || softmax(student)) of each row, float64."""
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (teacher, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * (np.log(p) - np.log(q))).sum(-1)


@pytest.mark.parametrize(("count", "width", "scale"), [(1, 2, 1.0), (7, 768, 1.0), (5, 64, 6.0)])
def test_kl_equals_numpy(count: int, width: int, scale: float) -> None:
    rng = np.random.default_rng(1)
    teacher, student = rng.normal(size=(2, count, width)) * scale
    found = hidden_kl(torch.tensor(teacher), torch.tensor(student))
    assert found.dtype == torch.float32 and found.shape == ()
    assert float(found) == pytest.approx(numpy_kl(teacher, student).mean(), rel=1e-4)
    assert abs(numpy_kl(teacher, student).mean() - numpy_kl(student, teacher).mean()) > 1e-3 or width == 2


def test_kl_of_low_precision_is_computed_in_float32() -> None:
    teacher, student = torch.randn(2, 6, 768, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = numpy_kl(teacher.double().numpy(), student.double().numpy()).mean()
    assert float(hidden_kl(teacher, student)) == pytest.approx(expected, rel=1e-5)


def test_kl_does_not_grow_with_the_number_of_rows() -> None:
    teacher, student = torch.randn(2, 6, 32)
    torch.testing.assert_close(hidden_kl(teacher.repeat(4, 1), student.repeat(4, 1)), hidden_kl(teacher, student))


# ---- the terms


@both
@pytest.mark.parametrize("switches", list(product((False, True), repeat=3)))
@pytest.mark.parametrize("kl_weight", [0.05, 2.0])
def test_the_eight_ablations(switches: tuple[bool, bool, bool], kl_weight: float, family: str) -> None:
    """Table 4: the mean of the MLM terms, plus lambda times the KL terms; each has its switch."""
    mlm_full, kl_global, kl_local = switches
    cfg = {"mlm_full": mlm_full, "kl_global": kl_global, "kl_local": kl_local, "kl_weight": kl_weight}
    model, batch = make_model(family=family, **cfg), make_batch()
    reference = make_model(kl_weight=kl_weight, family=family)(**batch, phase=Phase.ALIGN, keep=KEEP)[1]
    loss, parts, _ = run(model, batch, Phase.ALIGN)
    expected = reference["mlm_drop"]
    if mlm_full:
        expected = (reference["mlm_drop"] + reference["mlm_full"]) / 2
    expected = expected + kl_weight * (kl_global * reference["kl_global"] + kl_local * reference["kl_local"])
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert ("kl_global" in parts, "kl_local" in parts) == (kl_global, kl_local)
    assert ("mlm_full" in parts) == any(switches), "the full path runs where no term looks at it"
    assert float(reference["kl_global"]) > 1e-3 and float(reference["kl_local"]) > 1e-3


@both
@pytest.mark.parametrize(("mlm_full", "kl"), [(True, False), (True, True), (False, True)])
def test_an_align_step_without_the_dropping_paths_mlm_loss(mlm_full: bool, kl: bool, family: str) -> None:
    """Only ALIGN steps lose the term: it is all that a DROP step has. The table is fed in both."""
    model = make_model(family=family, mlm_drop=False, mlm_full=mlm_full, kl_global=kl, kl_local=kl, kl_weight=0.5)
    batch = make_batch()
    loss, parts, _ = run(model, batch, Phase.ALIGN)
    expected = mlm_full * float(parts["mlm_full"])
    expected += 0.5 * (float(parts["kl_global"]) + float(parts["kl_local"])) if kl else 0.0
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    model.importance.commit(True)
    assert (model.importance.scores_V != 10.0).any()
    loss, parts, _ = run(model, batch, Phase.DROP)
    assert torch.equal(loss, parts["mlm_drop"])


@both
@pytest.mark.parametrize("phase", [Phase.DROP, Phase.FULL])
@pytest.mark.parametrize("switches", [{}, {"mlm_drop": False}, {"mlm_full": False}])
def test_other_phases_are_their_mlm_loss_alone(phase: Phase, switches: dict[str, bool], family: str) -> None:
    """Whatever the switches, which speak of ALIGN steps."""
    loss, parts, _ = run(make_model(kl_weight=5.0, family=family, **switches), make_batch(), phase)
    name = "mlm_drop" if phase is Phase.DROP else "mlm_full"
    assert set(parts) == {"loss", name} and torch.equal(loss, parts[name])


def as_read(model: PretrainingModel, before: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """(X_{l-1}, X_l) as the last layer's attention and the head see them: a modernbert normalises them first."""
    if not model.bert.shape.is_modern:
        return before, last
    weights = model.bert.layers[-1].attention_norm.weight, model.bert.norm.weight
    before, last = (
        F.layer_norm(x, (32,), weight, None, 1e-12) for x, weight in zip((before, last), weights, strict=True)
    )
    return before, last


@both
@pytest.mark.parametrize("where", ["cls", "all"])
def test_kl_terms_compare_the_right_states(where: str, family: str) -> None:
    """KL_global after the last layer, KL_local before it, the full path as teacher; hooks read the states."""
    model, states = make_model(semantic_positions=where, family=family), []
    model.bert.layers[-1].register_forward_hook(
        lambda module, args, out: states.append((args[0] if args[1] is None else args[1], out))
    )
    _, parts = model(**make_batch(), phase=Phase.ALIGN, keep=KEEP)
    (full_before, full_last), (drop_before, drop_last) = (
        tuple(state.detach().numpy() for state in as_read(model, *pair)) for pair in states
    )
    assert drop_before.shape == full_before.shape == (3, LENGTH, 32)
    count = 1 if where == "cls" else LENGTH
    for name, teacher, student in (
        ("kl_global", full_last[:, :count], drop_last[:, :count]),
        ("kl_local", full_before[:, :count], drop_before[:, :count]),
    ):
        assert float(parts[name]) == pytest.approx(numpy_kl(teacher, student).mean(), rel=1e-5, abs=1e-6), name


def test_all_positions_are_those_that_hold_a_token() -> None:
    """`semantic_positions: all` is the mean over non-padding tokens (method.md, section 2)."""
    batch = make_batch()
    batch["input_ids"][:, 20:] = PAD
    batch["positions"] = torch.arange(1, 1 + TARGETS).expand(3, TARGETS).contiguous()
    model, states = make_model(semantic_positions="all"), []
    model.bert.layers[-1].register_forward_hook(lambda module, args, out: states.append(out.detach().numpy()))
    _, parts = model(**batch, phase=Phase.ALIGN, keep=KEEP)
    full_last, drop_last = states
    assert float(parts["kl_global"]) == pytest.approx(numpy_kl(full_last[:, :20], drop_last[:, :20]).mean(), rel=1e-5)


# ---- gradients


def mean_of(*grads: Grads) -> Grads:
    return {name: sum(g[name] for g in grads) / len(grads) for name in grads[0]}


@both
def test_full_path_receives_its_own_mlm_gradient(family: str) -> None:
    """Without KL, ALIGN's gradient is the mean of DROP's and FULL's (the authors' release had DROP's twice)."""
    batch = make_batch()
    drop, full, align = (
        run(make_model(family=family, kl_weight=0.0), batch, p)[2] for p in (Phase.DROP, Phase.FULL, Phase.ALIGN)
    )
    assert_grads(align, mean_of(drop, full))
    alone = run(make_model(family=family, kl_weight=0.0, mlm_full=False), batch, Phase.ALIGN)[2]
    assert_grads(alone, drop)
    difference = max(float((full[name] - drop[name]).abs().max()) for name in full)
    assert difference > 1e-3


@both
@pytest.mark.parametrize("where", ["cls", "all"])
@pytest.mark.parametrize("detach", [True, False])
def test_teacher_gets_kl_gradient_only_if_not_detached(detach: bool, where: str, family: str) -> None:
    """With its MLM term off, the full path takes part through KL alone; its first middle layer serves both paths."""
    options = {"mlm_full": False, "detach_teacher": detach, "semantic_positions": where}
    model, outputs = make_model(family=family, **options), []
    for layer in model.bert.layers[model.plan.middle]:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    loss, _ = model(**make_batch(), phase=Phase.ALIGN, keep=KEEP)
    assert [out.shape[1] for out in outputs] == [LENGTH, LENGTH, KEEP]
    shared, teacher, student = torch.autograd.grad(loss, outputs, allow_unused=True)
    dropped_B = (shared.abs().amax(-1) == 0).sum(-1)
    if detach:
        assert teacher is None
        assert dropped_B.tolist() == [LENGTH - KEEP] * 3  # the shared layer hears from the student's rows alone
    else:
        assert teacher.abs().max() > 1e-6
        assert dropped_B.tolist() == [0] * 3
    assert shared.abs().max() > 1e-6 and student.abs().max() > 1e-6


@both
@pytest.mark.parametrize("term", ["kl_global", "kl_local"])
def test_detached_kl_moves_the_student_alone(term: str, family: str) -> None:
    """Each KL term's share of the gradient, against a KL written out by hand with the teacher as a constant: the norm
    through which its states are read is moved from the student's side alone."""
    batch = make_batch()
    off = {"kl_global": False, "kl_local": False, "kl_weight": 7.0, "family": family}
    with_term = run(make_model(**{**off, term: True}), batch, Phase.ALIGN)[2]
    without = run(make_model(**off), batch, Phase.ALIGN)[2]
    model = make_model(family=family)
    drop, full = by_hand(model, batch, dropping=True), by_hand(model, batch, dropping=False)
    which = 1 if term == "kl_global" else 0
    teacher, student = full[which][:, 0].detach().log_softmax(-1), drop[which][:, 0].log_softmax(-1)
    (7.0 * (teacher.exp() * (teacher - student)).sum(-1).mean()).backward()
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert_grads(with_term, {name: without[name] + expected[name] for name in without})
    if family == "modernbert":
        reader = {"kl_global": "bert.norm.weight", "kl_local": "bert.layers.3.attention_norm.weight"}[term]
        assert expected[reader].abs().max() > 1e-3


def by_hand(model: PretrainingModel, batch: dict[str, Tensor], dropping: bool) -> tuple[Tensor, Tensor]:
    """(X_{l-1}, X_l) of one path as they are read, computed from the embeddings on, all layers in full."""
    first, layers = model.plan.first_dropped, model.bert.layers
    x = model.bert.embeddings(batch["input_ids"])
    for layer in layers[:first]:
        x = layer(x)
    if dropping:
        scores_V = model.importance.scores_V
        x = model.dropping(layers[first:-1], x, batch["input_ids"], scores_V, batch["row_seed"], KEEP)
    else:
        for layer in layers[first:-1]:
            x = layer(x)
    return as_read(model, x, layers[-1](x))


@both
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("layers", [2, 4, 6])
def test_shared_trunk_equals_two_trunks(layers: int, detach: bool, family: str) -> None:
    batch, options = make_batch(), {"layers": layers, "family": family}
    loss, _, grads = run(make_model(**options, kl_weight=3.0, detach_teacher=detach), batch, Phase.ALIGN)
    model = make_model(**options)
    drop, full = by_hand(model, batch, dropping=True), by_hand(model, batch, dropping=False)
    expected = torch.zeros((), dtype=torch.float64)
    rows = torch.arange(3)[:, None]
    for _, last in (drop, full):
        logits = model.bert.logits(last[rows, batch["positions"]]).log_softmax(-1)
        expected = expected - 0.5 * logits.gather(-1, batch["labels"][..., None]).mean()
    for student, teacher in zip(drop, full, strict=True):
        p = (teacher.detach() if detach else teacher)[:, 0].softmax(-1)
        q = student[:, 0].softmax(-1)
        expected = expected + 3.0 * (p * (p / q).log()).sum(-1).mean()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert_grads(grads, {name: p.grad for name, p in model.named_parameters()})


@both
@pytest.mark.parametrize("where", ["cls", "all"])
@pytest.mark.parametrize("phase", list(Phase))
def test_loss_scale_does_not_depend_on_the_number_of_rows(phase: Phase, where: str, family: str) -> None:
    batch = make_batch()
    repeated = {name: tensor.repeat(3, 1) if tensor.dim() == 2 else tensor.repeat(3) for name, tensor in batch.items()}
    options = {"kl_weight": 3.0, "semantic_positions": where, "family": family}
    loss, parts, grads = run(make_model(**options), batch, phase)
    loss3, parts3, grads3 = run(make_model(**options), repeated, phase)
    assert float(loss3) == pytest.approx(float(loss), rel=1e-6)
    for name, part in parts.items():
        assert float(parts3[name]) == pytest.approx(float(part), rel=1e-5), name
    assert_grads(grads3, grads)


# ---- around it


@both
def test_evaluation_reports_accuracy_and_logits_and_leaves_the_table_alone(family: str) -> None:
    model, batch = make_model(family=family).eval(), make_batch()
    with torch.no_grad():
        loss, parts = model(**batch)
        logits = model.bert(batch["input_ids"])
    guesses = logits.argmax(-1).gather(1, batch["positions"])
    assert set(parts) == {"loss", "mlm_full", "accuracy", "logits"} and torch.equal(loss, parts["mlm_full"])
    assert float(parts["accuracy"]) == pytest.approx(float((guesses == batch["labels"]).double().mean()))
    at_targets = logits.gather(1, batch["positions"][..., None].expand(-1, -1, VOCAB))
    torch.testing.assert_close(parts["logits"], at_targets)
    _, parts = model(**batch, phase=Phase.DROP, keep=KEEP)
    assert set(parts) == {"loss", "mlm_drop"}
    model.importance.commit(True)
    assert bool((model.importance.scores_V == 10.0).all())


@both
def test_the_table_is_fed_by_the_path_that_trains(family: str) -> None:
    """By the full one where it trains alone, by the dropping one where both do, and by that alone."""
    batch, tables, losses = make_batch(), {}, {}
    for phase in Phase:
        model = make_model(family=family)
        inputs = (batch[name] for name in ("input_ids", "positions", "labels", "row_seed"))
        paths = model.paths(*inputs, phase, KEEP)
        losses[phase] = [None if path is None else path.losses_BM.detach() for path in paths]
        model.importance.commit(True)
        tables[phase] = model.importance.scores_V
    assert losses[Phase.FULL][0] is None and losses[Phase.DROP][1] is None
    assert torch.equal(tables[Phase.DROP], tables[Phase.ALIGN])
    for phase, which in ((Phase.DROP, 0), (Phase.FULL, 1)):
        table = ImportanceTable(VOCAB, (0, 1, 2, 3, 4), 0.995)
        accumulate(table, batch["labels"], losses[phase][which])
        table.commit(True)
        torch.testing.assert_close(tables[phase], table.scores_V, rtol=1e-6, atol=0)
        assert bool((table.scores_V != 10.0).any())
    assert not torch.equal(tables[Phase.DROP], tables[Phase.FULL])


@pytest.mark.parametrize("arm", ARM_NAMES)
def test_a_full_step_of_each_arm(arm: str) -> None:
    """Of its full start, say: the baseline's loss and gradients, and an arm's table gathers the losses."""
    sizes = {"layers": 4, "hidden_size": 32, "heads": 2, "intermediate_size": 64, "max_positions": LENGTH}
    shape, special = BertShape(VOCAB, 4, 32, 2, 64, LENGTH, 0.1, 0.0), SpecialIds(PAD, 1, CLS, 3, MASK)
    found = []
    for name in ("baseline", arm):
        torch.manual_seed(0)
        model = build_model(config_from_dict({"arm": name, "model": sizes}), shape, special)
        found.append(run(model, make_batch(), Phase.FULL))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(grad, found[1][2][name]) for name, grad in found[0][2].items())
    assert (model.importance is not None) == (ARMS[arm].keep_by is KeepBy.IMPORTANCE)
    if model.importance is not None:
        assert int(model.importance.sum_count_2V[1].sum()) == make_batch()["labels"].numel()


@pytest.mark.parametrize("arm", ARM_NAMES)
def test_masks_by_importance_give_every_arm_a_table_and_change_no_path(arm: str) -> None:
    """The table gathers losses, and has a second one behind; what is kept goes by it only where it did before."""
    sizes = {"layers": 4, "hidden_size": 32, "heads": 2, "intermediate_size": 64, "max_positions": LENGTH}
    shape, special = BertShape(VOCAB, 4, 32, 2, 64, LENGTH, 0.0, 0.0), SpecialIds(PAD, 1, CLS, 3, MASK)
    found = []
    for how in ("random", "importance"):
        torch.manual_seed(0)
        model = build_model(config_from_dict({"arm": arm, "model": sizes, "data": {"mask_by": how}}), shape, special)
        if model.importance is not None:
            model.importance.restore(torch.rand(VOCAB, generator=torch.Generator().manual_seed(1)))
        phases = (Phase.FULL, Phase.DROP) if ARMS[arm].drops else (Phase.FULL,)
        found.append([run(model, make_batch(), phase)[0] for phase in phases])
    assert found[0] == found[1]
    assert model.importance is not None and {*model.tables} == {"scores", "masking"}
    assert int(model.importance.sum_count_2V[1].sum()) == len(phases) * make_batch()["labels"].numel()
    model.importance.commit(True)
    assert bool((model.tables["masking"] == 10.0).all()) and bool((model.tables["scores"] != 10.0).any())


def test_parts_carry_no_graph() -> None:
    _, parts = make_model()(**make_batch(), phase=Phase.ALIGN, keep=KEEP)
    assert not any(part.requires_grad for part in parts.values())


def test_scores_are_looked_up_with_the_visible_ids() -> None:
    """A target that shows another token is scored by that token; one that shows [MASK] is always kept."""
    model, batch, kept = make_model(), make_batch(1), []
    ids = batch["input_ids"]
    model.importance.scores_V = torch.zeros(VOCAB)
    model.importance.scores_V[50] = 1.0
    ids[ids == 50] = 51
    ids[0, 7:14] = 50
    model.bert.layers[1].register_forward_hook(lambda module, args, out: kept.append(args[0]))
    trunk = model.bert.layers[0](model.bert.embeddings(ids))
    model(**batch, phase=Phase.DROP, keep=KEEP)
    where = [int((trunk[0] - row).abs().sum(-1).argmin()) for row in kept[0][0]]
    assert set(range(7, 14)) <= set(where) and set(torch.where(ids[0] < 5)[0].tolist()) <= set(where)

"""FLOPs of a step: against the figures of the design and against products counted by torch."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sctd.config import ModelConfig, ObjectiveConfig
from sctd.model.bert import Bert, BertShape
from sctd.model.token_dropping import LayerPlan, TokenDropping
from sctd.objective.arms import ARMS
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd.train.accounting import StepFlops, device_peak

BASE = BertShape(30522, 12, 768, 12, 3072, 512)
LARGE = BertShape(30522, 24, 1024, 16, 4096, 512)


def make(shape: BertShape, length: int, targets: int | None = None, **options: Any) -> StepFlops:
    """As the design counts: the last layer in full."""
    plan = LayerPlan(shape.layers, shape.layers // 2 - 1, 1)
    targets = round(0.15 * length) if targets is None else targets
    return StepFlops(shape, plan, length, targets, options.pop("outputs", length), **options)


@pytest.mark.parametrize(
    ("shape", "length", "giga"), [(BASE, 128, 0.545), (BASE, 512, 0.588), (LARGE, 128, 1.879), (LARGE, 512, 1.992)]
)
def test_flops_of_a_token_are_those_of_the_design(shape: BertShape, length: int, giga: float) -> None:
    assert make(shape, length).row(Phase.FULL, 0) / length / 1e9 == pytest.approx(giga, rel=0.002)


@pytest.mark.parametrize(("shape", "length", "ratio"), [(BASE, 512, 0.746), (LARGE, 512, 0.744), (BASE, 128, 0.754)])
def test_cost_of_token_dropping(shape: BertShape, length: int, ratio: float) -> None:
    """The design's table counts the encoder; with the head of masked positions the ratio moves by less than 0.01."""
    for targets, tolerance in ((0, 0.002), (None, 0.01)):
        flops = make(shape, length, targets)
        found = flops.row(Phase.DROP, length // 2) / flops.row(Phase.FULL, 0)
        assert found == pytest.approx(ratio, abs=tolerance)


@pytest.mark.parametrize("shape", [BASE, LARGE])
def test_cost_of_sctd(shape: BertShape) -> None:
    flops = make(shape, 512, targets=0)
    full, drop, align = (flops.row(phase, 256) for phase in (Phase.FULL, Phase.DROP, Phase.ALIGN))
    assert (9 * drop + align) / 10 / full == pytest.approx(0.797, abs=0.005)  # 0.804, less a layer on half the tokens
    assert (9 * drop + (drop + full)) / 10 / full == pytest.approx(0.846, abs=0.003)  # the trunk run twice
    assert align / full == pytest.approx(1.26, abs=0.03)


def test_a_short_last_layer_saves_3_to_6_percent() -> None:
    for shape, length in ((BASE, 128), (BASE, 512), (LARGE, 512)):
        targets = round(0.15 * length)
        short, whole = (make(shape, length, outputs=outputs) for outputs in (1 + targets, length))
        saved = 1 - short.row(Phase.FULL, 0) / whole.row(Phase.FULL, 0)
        assert 0.02 < saved < 0.06
        drop = 1 - short.row(Phase.DROP, length // 2) / whole.row(Phase.DROP, length // 2)
        assert drop > saved


def test_corners() -> None:
    flops = make(BASE, 128)
    full = flops.row(Phase.FULL, 0)
    assert flops.row(Phase.DROP, 128) == pytest.approx(full, rel=1e-12)
    assert flops.row(Phase.DROP, 16) < flops.row(Phase.DROP, 64) < full < flops.row(Phase.ALIGN, 64)
    alone = make(BASE, 128, align_full=False)
    assert alone.row(Phase.ALIGN, 64) == alone.row(Phase.DROP, 64) == flops.row(Phase.DROP, 64)
    assert make(BASE, 128, per_layer=True).row(Phase.DROP, 64) < flops.row(Phase.DROP, 64)


@pytest.mark.parametrize("arm", ["baseline", "token_drop", "sctd", "random_ltd"])
@pytest.mark.parametrize("where", ["cls", "all"])
def test_flops_are_those_that_torch_counts(arm: str, where: str) -> None:
    """Forward and backward of the model at work, counted by torch's own counter, within 2 %."""
    layers, length, targets, keep, rows = 6, 64, 9, 32, 2
    shape = BertShape(500, layers, 64, 4, 256, length, dropout=0.0, attention_dropout=0.0)
    chosen, objective = ARMS[arm], ObjectiveConfig(semantic_positions=where)
    per_layer = arm == "random_ltd"
    model = PretrainingModel(
        Bert(shape),
        chosen.layer_plan(ModelConfig(layers=layers)),
        objective,
        TokenDropping((2, 3, 4, 1), 0, per_layer) if chosen.drops else None,
    )
    batch = {
        "input_ids": torch.randint(5, 500, (rows, length)),
        "positions": torch.arange(1, 1 + targets).expand(rows, -1).contiguous(),
        "labels": torch.randint(5, 500, (rows, targets)),
        "row_seed": torch.arange(rows),
    }
    outputs = length if where == "all" else 1 + targets
    flops = StepFlops(shape, model.plan, length, targets, outputs, True, per_layer)
    phases = {"baseline": [Phase.FULL], "sctd": [Phase.DROP, Phase.ALIGN]}.get(arm, [Phase.DROP])
    for phase in phases:
        # attention as plain products, which the counter knows on every device
        plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with plain, FlopCounterMode(display=False) as counter:
            model(**batch, phase=phase, keep=keep)[0].backward()
        assert flops.row(phase, keep) * rows == pytest.approx(counter.get_total_flops(), rel=0.02), phase


def test_peak_of_a_processor_is_measured() -> None:
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert peak is not None and 1e8 < peak < 1e15

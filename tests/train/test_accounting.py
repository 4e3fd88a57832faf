"""FLOPs of a step: against the figures of the design and against products counted by torch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sctd.config import FAMILIES
from sctd.model.bert import BertShape
from sctd.model.token_dropping import LayerPlan
from sctd.objective.arms import ARMS
from sctd.objective.schedule import Phase
from sctd.train.engine.devices import GPUS, device_peak, gpu_named
from sctd.train.flops import StepFlops
from small_models import counted, phases, small, small_batch

BASE = BertShape(30522, 12, 768, 12, 3072, 512)
LARGE = BertShape(30522, 24, 1024, 16, 4096, 512)
MODERN = BertShape(30522, 22, 768, 12, 1152, 512, family="modernbert")
MODERN_LARGE = BertShape(30522, 28, 1024, 16, 2624, 512, family="modernbert")


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


@pytest.mark.parametrize(
    ("shape", "length", "drop", "sctd"),
    [(MODERN, 512, 0.739, 0.791), (MODERN, 128, 0.752, 0.803), (MODERN_LARGE, 512, 0.740, 0.791)],
)
def test_cost_of_both_in_a_modernbert(shape: BertShape, length: int, drop: float, sctd: float) -> None:
    """With the head, and a last layer at the masked positions and [CLS] alone."""
    targets = round(0.15 * length)
    flops = make(shape, length, targets, outputs=1 + targets)
    costs = {phase: flops.row(phase, length // 2) / flops.row(Phase.FULL, 0) for phase in Phase}
    assert costs[Phase.DROP] == pytest.approx(drop, abs=0.001)
    assert (9 * costs[Phase.DROP] + costs[Phase.ALIGN]) / 10 == pytest.approx(sctd, abs=0.001)


def test_a_gate_has_a_product_of_its_own() -> None:
    bert, modern = (make(replace(BASE, family=family), 128).row(Phase.FULL, 0) for family in FAMILIES)
    assert modern - bert == 3 * 12 * 128 * 2 * 768 * 3072


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arm", sorted(ARMS))
@pytest.mark.parametrize("where", ["cls", "all"])
@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_that_torch_counts(family: str, arm: str, where: str, recompute: bool) -> None:
    """Forward and backward of the model at work, counted by torch's own counter, within 0.1 %."""
    length, rows = 64, 2
    model, work = small(arm, length, where, recompute, family=family)
    for phase, keep in phases(arm):
        batch = small_batch(rows, length, work.targets)
        assert counted(model, batch, phase, keep) == pytest.approx(work.hardware_row(phase, keep) * rows, rel=1e-3)
    assert recompute or work.hardware_row(phase, keep) == work.row(phase, keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_an_align_step_without_its_full_path_are_those_that_torch_counts(family: str) -> None:
    model, work = small("sctd", 64, family=family, mlm_full=False, kl_global=False, kl_local=False)
    found = counted(model, small_batch(2, 64, work.targets), Phase.ALIGN, 32)
    assert found == pytest.approx(work.row(Phase.ALIGN, 32) * 2, rel=1e-3)


def test_recomputation_adds_the_layers_forward_and_no_more() -> None:
    plain, again = make(BASE, 512), make(BASE, 512, recompute=True)
    assert again.row(Phase.FULL, 0) == plain.row(Phase.FULL, 0)
    extra = again.hardware_row(Phase.FULL, 0) / plain.hardware_row(Phase.FULL, 0)
    assert 1.25 < extra < 4 / 3  # all but the head


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
    ],
)
def test_gpus_are_known_by_their_drivers_name(name: str, key: str) -> None:
    found = gpu_named(name)
    assert found is not None and (found.half, found.single) == (GPUS[key].half, GPUS[key].single)


def test_a_gpu_that_is_not_in_the_table_has_no_peak() -> None:
    assert gpu_named("NVIDIA A10G") is None and gpu_named("NVIDIA GeForce RTX 4090") is None


def test_peak_of_a_processor_is_measured() -> None:
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert peak is not None and 1e8 < peak < 1e15

"""`sctd plan`: its counts against the real model, and the prediction's behaviour where sizes change."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sctd.cli import main
from sctd.config import ARMS, FAMILIES, load_config
from sctd.model.bert import Bert, BertShape
from sctd.objective.pretraining import PretrainingModel
from sctd.objective.schedule import Phase
from sctd.plan.memory import (
    STAGES,
    Memory,
    largest_micro_batch,
    matrix_parameters,
    memory,
    parameter_count,
    saved,
    storage_of,
)  # fmt: skip
from sctd.plan.report import Forecast, forecast, parse_gpus, plan
from sctd.plan.workload import Step, make_workload
from sctd.train.engine.devices import GPUS
from sctd.train.engine.muon import layer_matrices
from sctd.train.flops import Work
from small_models import VOCABULARY, phases, small, small_batch
from support import sctd

BASE, LARGE = BertShape(30522, 12, 768, 12, 3072, 512), BertShape(30522, 24, 1024, 16, 4096, 512)
SLIM = BertShape(501, 4, 48, 3, 100, 70)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [BASE, LARGE, SLIM])
def test_parameters_are_counted_exactly(shape: BertShape, family: str) -> None:
    shape = replace(shape, family=family)
    with torch.device("meta"):
        model = Bert(shape)
    assert parameter_count(shape) == sum(parameter.numel() for parameter in model.parameters())


def stored(model: PretrainingModel, batch: dict[str, Tensor], phase: Phase, keep: int, autocast: bool) -> int:
    """Bytes that a forward keeps for its backward, each storage once, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(**batch, phase=phase, keep=keep)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arm", ["baseline", "token_drop", "sctd", "random_ltd"])
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 1), ("bf16", 1), ("bf16", 0)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("where", "dropout"), [("cls", 0.1), ("all", 0.0)])
def test_activations_are_those_that_autograd_keeps(
    family: str, arm: str, precision: str, stage: int, recompute: bool, where: str, dropout: float
) -> None:
    """By the growth from 4 rows to 8: what does not grow (autocast's copies of the weights) is no activation."""
    model, work = small(arm, 64, where, recompute, dropout, family)
    store = storage_of(precision, stage)
    model.to(torch.bfloat16 if store.hidden == 2 else torch.float32)
    for phase, keep in phases(arm):
        few, many = (
            stored(model, small_batch(rows, 64, work.targets), phase, keep, autocast=store.casts) for rows in (4, 8)
        )
        logits = work.heads(phase) * work.targets * VOCABULARY * store.product
        expected = saved(work, phase, keep, store, plain=True) + logits
        assert (many - few) / 4 == pytest.approx(expected, rel=0.06), phase


def steps_of(arm: str, *overrides: str) -> dict[Step, float]:
    return make_workload(load_config("bert-base-baseline", [f"arm={arm}", *overrides]), 512).steps


def test_memory_falls_with_the_stage_and_the_gpus() -> None:
    steps = steps_of("sctd")
    for gpus in (1, 2, 8, 64):
        taken = [memory(steps, gpus, stage, "bf16", 32) for stage in STAGES]
        states = [item.parameters + item.float32_copies + item.gradients + item.optimizer_states for item in taken]
        assert gpus == 1 or states[1] > states[2] > states[3]
        assert taken[0].parameters == 2 * taken[1].parameters == 4 * parameter_count(BASE)
    for stage in (1, 2, 3):
        totals = [memory(steps, gpus, stage, "bf16", 32).total for gpus in (1, 2, 4, 8)]
        assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


@pytest.mark.parametrize("shape", [BASE, SLIM])
def test_muon_keeps_one_moment_of_the_matrices(shape: BertShape) -> None:
    with torch.device("meta"):
        model = Bert(shape)
    moved = sum(matrices.parts * matrices.size for matrices in layer_matrices(model).values())
    assert matrix_parameters(shape) == moved
    steps = steps_of("sctd")
    adamw, muon = (memory(steps, 8, 1, "bf16", 32, each).optimizer_states for each in (False, True))
    assert adamw - muon == 4 * matrix_parameters(next(iter(steps)).work.shape) / 8


def test_memory_grows_with_the_micro_batch_and_recomputation_shrinks_it() -> None:
    steps, again = steps_of("sctd"), steps_of("sctd", "train.checkpoint_activations=true")
    totals = [memory(steps, 8, 1, "bf16", rows).total for rows in (1, 2, 4, 8, 32)]
    assert totals == sorted(totals) and len(set(totals)) == len(totals)
    less, more = (memory(item, 8, 1, "bf16", 32) for item in (again, steps))
    assert less.activations < 0.2 * more.activations and less.total < more.total
    drop, full = (memory(steps_of(arm), 8, 1, "bf16", 32).activations for arm in ("token_drop", "baseline"))
    assert drop < full < more.activations  # an ALIGN step keeps both paths


def test_memory_is_that_of_the_steps_that_take_most() -> None:
    def taken(arm: str, *overrides: str) -> Memory:
        return memory(steps_of(arm, *overrides), 8, 1, "bf16", 32)

    drop, full = taken("token_drop"), taken("baseline")
    assert taken("token_drop", "schedule.full_start=1") == taken("token_drop", "schedule.full_finish=1") == full
    assert taken("token_drop", "data.mask_stages=[[9,0.1]]") == drop
    more = taken("token_drop", "data.mask_stages=[[9,0.3],[99,0.1]]")
    assert more == taken("token_drop", "data.mask_probability=0.3") and more.logits > 1.9 * drop.logits


@pytest.mark.parametrize("stage", STAGES)
def test_the_largest_micro_batch_fits_and_one_more_does_not(stage: int) -> None:
    steps = steps_of("sctd")
    rows = largest_micro_batch(steps, 8, stage, "bf16", 30e9)
    assert rows > 1
    assert memory(steps, 8, stage, "bf16", rows).total <= 30e9
    assert memory(steps, 8, stage, "bf16", rows + 1).total > 30e9
    assert largest_micro_batch(steps, 8, stage, "bf16", 1e6) == 0


def predicted(recipe: str, gpus: str, *overrides: str, stage: int = 1, length: int = 512) -> Forecast:
    return forecast(make_workload(load_config(recipe, overrides), length), parse_gpus(gpus), stage)


def seconds(recipe: str, gpus: str, *overrides: str, stage: int = 1) -> float:
    time = predicted(recipe, gpus, *overrides, stage=stage).time
    assert time is not None
    return time.total


@pytest.mark.parametrize(
    ("recipe", "gpus", "low", "high"),
    [
        ("bert-large-baseline", "H200-141GB", 0.48, 0.54),  # the design's roofline: 54 %; the best in public: 50 %
        ("bert-base-baseline", "H200-141GB", 0.44, 0.50),  # 47 %
        ("bert-large-baseline", "A100-80GB", 0.47, 0.54),  # the best in public: 51 %
    ],
)
def test_the_prediction_is_near_the_designs_anchors(recipe: str, gpus: str, low: float, high: float) -> None:
    workload, machine = make_workload(load_config(recipe), 512), parse_gpus(gpus)
    time = forecast(workload, machine, 1).time
    assert time is not None
    assert low < workload.mean() * workload.config.train.batch_size / time.total / machine.gpu.half < high


@pytest.mark.parametrize("family", FAMILIES)
def test_token_dropping_is_predicted_as_the_design_targets(family: str) -> None:
    def of(arm: str, *overrides: str) -> float:
        return seconds(f"{family}-base-{arm}", "H200-141GB", *overrides)

    always = ("schedule.full_start=0", "schedule.full_finish=0")
    full, drop, sctd = of("baseline"), of("token-drop", *always), of("sctd", *always)
    assert 0.70 < drop / full < 0.78
    assert drop < sctd < full and sctd / full < 0.83
    fourth = of("sctd", "schedule.full_start=50000", "schedule.full_finish=12500")  # of 250,000
    assert fourth == pytest.approx(0.75 * sctd + 0.25 * full, rel=1e-3)


def test_time_falls_with_faster_and_more_gpus_and_rises_with_recomputation() -> None:
    recipe, again = "bert-base-sctd", "train.checkpoint_activations=true"
    times = [seconds(recipe, f"8x{name}") for name in ("H200-141GB", "H100-80GB", "A100-80GB", "A100-40GB", "A10")]
    assert times == sorted(times)
    assert seconds(recipe, "2xA100-80GB") > seconds(recipe, "4xA100-80GB") > seconds(recipe, "8xA100-80GB")
    assert 1.15 < seconds(recipe, "8xA100-80GB", again) / seconds(recipe, "8xA100-80GB") < 1.34


def test_the_limit_is_named() -> None:
    def bound(recipe: str, gpus: str, *overrides: str, stage: int = 1) -> str:
        workload, machine = make_workload(load_config(recipe, overrides), 512), parse_gpus(gpus)
        return forecast(workload, machine, stage).limit

    assert bound("bert-base-sctd", "8xH200-141GB") == "compute"
    assert bound("bert-large-sctd", "8xL40S", "train.batch_size=8", "train.micro_batch_size=1") == "all-reduce"
    assert bound("bert-large-sctd", "A10", "train.micro_batch_size=256") == "capacity"
    slim = ("model.hidden_size=32", "model.heads=1", "model.intermediate_size=32")
    assert bound("bert-base-sctd", "H100-80GB", *slim) == "bandwidth"


def test_random_ltd_plans_for_its_growing_subset() -> None:
    workload = make_workload(load_config("bert-base-baseline", ["arm=random_ltd"]), 512)
    keeps = {step.keep for step in workload.steps}
    assert sum(workload.steps.values()) == pytest.approx(1) and min(keeps) < 272 and max(keeps) == 512
    fixed = make_workload(load_config("bert-base-baseline", ["arm=random_drop"]), 512)
    assert fixed.mean() < workload.mean() < make_workload(load_config("bert-base-baseline"), 512).mean()


def test_shares_of_the_steps_follow_the_interval_and_the_stages() -> None:
    def kinds(*overrides: str) -> dict[tuple[Phase, int, int], float]:
        words = ["objective.interval=4", "train.steps=20", "schedule.warmup_steps=0", *overrides]
        workload = make_workload(load_config("bert-base-sctd", words), 512)
        return {
            (phase, keep, work.targets): round(20 * share, 9) for (work, phase, keep), share in workload.steps.items()
        }

    assert kinds() == {(Phase.DROP, 256, 77): 15, (Phase.ALIGN, 256, 77): 5}
    whole = ("schedule.full_start=5", "schedule.full_finish=3")  # 6 to 17 between them, of which 8, 12 and 16 align
    assert kinds(*whole) == {(Phase.FULL, 512, 77): 8, (Phase.DROP, 256, 77): 9, (Phase.ALIGN, 256, 77): 3}
    assert kinds(*whole, "data.mask_stages=[[4,0.3],[12,0.2]]") == {
        (Phase.FULL, 512, 77): 3, (Phase.FULL, 512, 154): 2, (Phase.DROP, 256, 154): 5, (Phase.ALIGN, 256, 154): 1,
        (Phase.DROP, 256, 102): 4, (Phase.ALIGN, 256, 102): 2, (Phase.FULL, 512, 102): 3,
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arm", ARMS)
def test_the_mean_is_that_of_all_steps(arm: str, family: str) -> None:
    words = [
        f"arm={arm}", "train.steps=5000", "schedule.warmup_steps=0", "schedule.decay_steps=0",
        "schedule.full_start=1300", "schedule.full_finish=600", "data.mask_stages=[[400,0.3],[2000,0.25],[4800,0.1]]",
    ]  # fmt: skip
    workload = make_workload(load_config(f"{family}-base-baseline", words), 512)
    total = Work(workload.config, workload.work.shape, (512,)).until(5000)
    assert workload.mean() * 5000 * workload.config.train.batch_size == pytest.approx(
        total, rel=1e-3 if "ltd" in arm else 1e-12
    )


def test_auto_is_the_precision_of_the_gpu() -> None:
    recipe = "modernbert-base-sctd"
    for name, precision in (("A100-40GB", "bf16"), ("V100-32GB", "fp16")):
        assert predicted(recipe, name) == predicted(recipe, name, f"train.precision={precision}")
        assert f"arm sctd, {precision}: a" in plan(recipe, load_config(recipe), name)


@pytest.mark.parametrize("recipe", ["bert-mini-token-drop", "modernbert-base-baseline", "bert-large-sctd"])
@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_gets_a_plan(recipe: str, name: str) -> None:
    text = plan(recipe, load_config(recipe), f"8x{name}")
    assert "bound by" in text and all(f"ZeRO-{stage}" in text for stage in STAGES)
    assert max(map(len, text.splitlines())) < 200 and "nan" not in text and "inf" not in text


def test_the_verb_prints_its_assumptions_and_the_saving() -> None:
    done = sctd("plan", "bert-base-token-drop", "--gpus", "8xa100-40gb", "--seq-len", "128", "train.steps=30000")
    assert done.returncode == 0, done.stderr
    for words in (
        "a prediction",
        "30522 token ids (assumed)",
        "rows of 128 tokens",
        "8 x A100-40GB",
        "largest micro-batch",
        "days for 30000 steps",
        "token_drop saves 2",
    ):
        assert words in done.stdout, words
    assert not done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8xFOO"], ["8xFOO", "A100-40GB", "V100-32GB"]),
        (["--gpus", "0xA10"], ["0xA10", "NxMODEL"]),
        (["--gpus", "x"], ["NxMODEL"]),
        (["--gpus", "8xA100"], ["8xA100", "A100-40GB"]),
        (["--gpus", "V100-32GB", "train.precision=bf16"], ["bf16", "train.precision=fp16"]),
        (["--gpus", "7xA10"], ["train.batch_size", "7 ranks"]),
        (["--gpus", "2048xA10"], ["train.batch_size"]),
        (["--gpus", "A10", "--seq-len", "1024"], ["--seq-len", "512"]),
        (["--gpus", "A10", "model.layres=4"], ["layres", "layers"]),
        (["--gpus", "A10", "optimizer.name=muon", "train.zero_stage=3"], ["ZeRO stage 3", "muon"]),
        ([], ["--gpus"]),
    ],
)
def test_plan_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert main(["plan", "bert-base-sctd", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("sctd: error: ") and line.count("\n") == 1
    assert all(word in line for word in words), line

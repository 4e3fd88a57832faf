"""FLOPs of a run so far: against adding up its steps one by one."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

from sctd.config import ARMS, FAMILIES, Config, load_config
from sctd.corpus.manifest import Manifest, read_manifest
from sctd.data.masking import mask_share, target_count
from sctd.objective.build import bert_shape, build_hook, row_lengths
from sctd.objective.schedule import Phase
from sctd.train.flops import Work, flops_until, step_flops

STEPS = 97
# Intervals, warm-ups on shorter rows, full starts and finishes, and shares of masked tokens, in all relations.
SCHEDULES = {
    "every step aligns": ["objective.interval=1"],
    "plain": [],
    "short rows first": ["objective.interval=7", "data.warmup_seq_len=32", "data.warmup_steps=30"],
    "short rows alone": ["data.warmup_seq_len=32", f"data.warmup_steps={STEPS}"],
    "full start and finish": ["schedule.full_start=11", "schedule.full_finish=9"],
    "full but for a step": ["schedule.full_start=60", "schedule.full_finish=36"],
    "more masks, then fewer": ["data.mask_stages=[[21,0.3],[65,0.1]]"],
    "all of it": [
        "objective.interval=5", "data.warmup_seq_len=32", "data.warmup_steps=30", "schedule.full_start=20",
        "schedule.full_finish=40", "data.mask_stages=[[20,0.3],[21,0.25],[58,0.2],[97,0.1]]",
    ],
}  # fmt: skip


def one_by_one(config: Config, manifest: Manifest) -> list[float]:
    """Of the first 0, 1, 2, ... steps."""
    shape, lengths = bert_shape(config, manifest), row_lengths(config, manifest)
    hook, share = build_hook(config, lengths[0]), mask_share(config)
    costs = []
    for step in range(1, config.train.steps + 1):
        length = lengths[-1] if step <= config.data.warmup_steps else lengths[0]
        work = step_flops(config, shape, length, share(step))
        assert work.targets == target_count(share(step), length)
        costs.append(config.train.batch_size * work.row(hook.phase(step), hook.keep(step, length)))
    return [*accumulate(costs, initial=0.0)]


def two_lengths(manifest: Manifest) -> Manifest:
    """The same corpus, as if it were packed to rows of 32 too."""
    return replace(manifest, seq_lens=(32, 64), splits={32: manifest.splits[64], 64: manifest.splits[64]})


@pytest.fixture
def manifest(corpus: Path) -> Manifest:
    return two_lengths(read_manifest(corpus))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_many_as_its_steps_have(recipe: Path, manifest: Manifest, arm: str, schedule: str) -> None:
    config = load_config(str(recipe), [f"arm={arm}", f"train.steps={STEPS}", *SCHEDULES[schedule]])
    expected, numbers = one_by_one(config, manifest), range(STEPS + 1)
    assert flops_until(config, manifest, numbers) == pytest.approx(expected, rel=1e-12)
    work = Work(config, bert_shape(config, manifest), row_lengths(config, manifest))
    assert [*accumulate((work.step(number)[0] for number in numbers[1:]), initial=0.0)] == pytest.approx(expected)


def test_a_long_run_with_a_growing_subset(recipe: Path, manifest: Manifest) -> None:
    words = ["arm=random_ltd", "train.steps=3000", "schedule.full_start=1000", "data.mask_stages=[[2000,0.3]]"]
    config = load_config(str(recipe), words)
    expected = one_by_one(config, manifest)
    numbers = [0, 999, 1000, 1001, 1999, 2000, 2999, 3000]
    assert flops_until(config, manifest, numbers) == pytest.approx([expected[number] for number in numbers], rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_arms_cost_what_their_paths_do(recipe: Path, manifest: Manifest, family: str) -> None:
    def cost(arm: str, *words: str) -> float:
        config = load_config(str(recipe), [f"arm={arm}", f"model.family={family}", *words])
        return flops_until(config, manifest, [10])[0]

    full, drop, sctd, ltd = map(cost, ("baseline", "token_drop", "sctd", "random_ltd"))
    assert drop == cost("random_drop") < sctd < full and drop < ltd < full
    start = ["schedule.full_start=4", "schedule.full_finish=1"]
    assert cost("token_drop", *start) == pytest.approx((drop + full) / 2, rel=1e-12)
    assert cost("baseline", *start) == full
    assert full < cost("baseline", "data.mask_stages=[[6,0.3]]") < cost("baseline", "data.mask_probability=0.3")


def test_recomputation_is_executed_and_no_work_of_the_model(recipe: Path, manifest: Manifest) -> None:
    for words in ([], ["train.checkpoint_activations=true"]):
        config = load_config(str(recipe), words)
        work = Work(config, bert_shape(config, manifest), row_lengths(config, manifest))
        model, executed = work.step(4)
        assert (1.2 * model < executed < 4 / 3 * model) if words else executed == model


def test_time_to_the_end_goes_by_the_work_that_is_left(recipe: Path, manifest: Manifest) -> None:
    """Dropping steps are faster than full ones, and those on short rows faster than on long ones."""
    words = ["data.warmup_seq_len=32", "data.warmup_steps=10", "train.steps=40", "schedule.full_finish=10"]
    config = load_config(str(recipe), words)
    work = Work(config, bert_shape(config, manifest), row_lengths(config, manifest))
    until = one_by_one(config, manifest)
    for step, goal in ((4, 40), (10, 40), (30, 40), (35, 40), (40, 40), (4, 20)):
        left = work.seconds_left({"step": step, "flops_per_s": 1e6}, goal)
        assert left == pytest.approx((until[goal] - until[step]) / 1e6, abs=1e-9)
    assert build_hook(config, 64).phase(30) is Phase.DROP and build_hook(config, 64).phase(31) is Phase.FULL

"""Numbers that go wrong: steps that are skipped, data that is passed over, losses that jump or do not move."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sctd.config import config_from_dict, load_config
from sctd.train.keep.checkpoint import read_weights
from sctd.train.loop.guards import Curve, GoBack, Plateau, Skips, levers, spread
from support import assert_same_run, environment, records, sctd, train

# A run whose gradients are not a number wherever certain samples take part.
POISONED = """
import sys
import deepspeed
from sctd.cli import main
from sctd.data.stream import TrainStream
first, end = int(sys.argv[1]), int(sys.argv[2])
iterate, backward, now = TrainStream.iterate, deepspeed.DeepSpeedEngine.backward, []
def watched(self, cursor, number):
    for batches in iterate(self, cursor, number):
        now[:], cursor = self.samples(cursor)
        yield batches
def poisoned(self, loss, *args, **kwargs):
    bad = any(first <= sample < end for sample in now)
    return backward(self, loss * float("nan") if bad else loss, *args, **kwargs)
TrainStream.iterate, deepspeed.DeepSpeedEngine.backward = watched, poisoned
sys.exit(main(sys.argv[3:]))
"""
LONG = ("train.steps=14", "train.save_every=3")


def poisoned(first: int, end: int, *arguments: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", POISONED, str(first), str(end), "pretrain", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 0), ("fp32", 1), ("fp32", 3), ("bf16", 3)])
def test_a_step_without_finite_gradients_is_skipped(recipe: Path, tmp_path: Path, precision: str, stage: int) -> None:
    """Whatever keeps the float32 parameters: the step of samples 16..23 changes nothing, and is counted and told."""
    options = (recipe, f"run.dir={tmp_path}", f"train.precision={precision}", f"train.zero_stage={stage}")
    done = poisoned(16, 24, *options, "train.stop_at=4", "train.save_every=1", "train.keep_checkpoints=4")
    assert done.returncode == 0, done.stderr
    assert [record["skipped_steps"] for record in records(tmp_path)] == [0, 0, 1, 1]
    assert "step 3 skipped, its gradients are not finite: samples 16 to 24" in done.stdout
    weights = [read_weights(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (2, 3, 4)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not all(weights[1][name].equal(weights[2][name]) for name in weights[0])


def test_a_checkpoint_amid_bad_data_is_gone_back_to(recipe: Path, tmp_path: Path) -> None:
    """Samples 40..63 are bad, steps 6 to 8; step 6, which changed nothing, was saved, and its number is spent."""
    done = poisoned(40, 64, recipe, f"run.dir={tmp_path}", *LONG, "train.rollback_after=3")
    assert done.returncode == 0, done.stderr
    assert "going back to step 6 (step-00000006), and passing over samples 40 to 64" in done.stdout
    last = records(tmp_path)[-1]
    assert last["skipped_steps"] == 1 and last["samples"] == (14 - 1) * 8 + 24


def test_the_checkpoint_before_bad_data_gives_the_run_without_it(recipe: Path, tmp_path: Path) -> None:
    """Steps 7 to 9 are bad and step 6 was saved: bit for bit the run that never saw samples 48..71."""
    done = poisoned(48, 72, recipe, f"run.dir={tmp_path / 'bad'}", *LONG, "train.rollback_after=3")
    assert done.returncode == 0, done.stderr
    train(recipe, tmp_path / "clean", *LONG, "data.skip_samples=[[48,72]]")
    assert_same_run(tmp_path / "bad", tmp_path / "clean")
    assert records(tmp_path / "clean")[-1]["samples"] == 14 * 8 + 24


def test_bad_data_without_a_checkpoint_ends_the_run(recipe: Path, tmp_path: Path) -> None:
    done = poisoned(0, 1000, recipe, f"run.dir={tmp_path}", "train.rollback_after=3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "3 steps in a row had gradients that are not finite (samples 0 to 24)" in done.stderr


def test_a_run_that_is_bad_everywhere_ends(recipe: Path, tmp_path: Path) -> None:
    done = poisoned(8, 10000, recipe, f"run.dir={tmp_path}", "train.rollback_after=1", "train.save_every=1")
    assert done.returncode == 2 and "went back 3 times" in done.stderr and "Traceback" not in done.stderr


def test_skip_samples_can_be_added_at_a_resume(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "late", "train.stop_at=4")
    train(recipe, tmp_path / "late", "data.skip_samples=[[40,48]]", "--resume")
    train(recipe, tmp_path / "whole", "data.skip_samples=[[40,48]]")
    assert_same_run(tmp_path / "late", tmp_path / "whole")
    bad = sctd("pretrain", recipe, f"run.dir={tmp_path / 'x'}", "data.skip_samples=[[9,9]]")
    assert bad.returncode == 2 and "data.skip_samples" in bad.stderr and not (tmp_path / "x").exists()


def test_skips_are_counted_in_a_row() -> None:
    skips = Skips(3, "fp32")
    for applied in (False, False, True, False, False):
        skips.add(applied, 10, 20)
    with pytest.raises(GoBack) as caught:
        skips.add(False, 20, 30)
    assert caught.value.span == (10, 30)
    never, scaled = Skips(0, "fp32"), Skips(3, "fp16")
    for _ in range(18):  # an fp16 scaler finds its scale by skipping
        never.add(False, 0, 1)
        scaled.add(False, 0, 1)
    with pytest.raises(GoBack):
        scaled.add(False, 0, 1)


def warnings(losses: list[float], phases: str = "mlm_drop", cursor: int = 0) -> list[str]:
    curve, said = Curve(cursor), []
    for step, loss in enumerate(losses, start=1):
        record: dict[str, Any] = {"step": step, "samples": cursor + 8 * step, "mlm_drop": None, "mlm_full": None}
        said += curve.look(record | {phases: loss})
    return said


@pytest.mark.parametrize("name", ["mlm_drop", "mlm_full"])
def test_a_spike_is_named_with_its_samples(name: str) -> None:
    falling = [8.0 - 0.05 * step for step in range(30)]
    assert warnings(falling, phases=name) == []
    (said,) = warnings([*falling, 9.0, 6.4], phases=name)
    assert "spike at step 31: 9.000" in said and "data.skip_samples=[[240,248]]" in said
    (said,) = warnings([5.0] * 10 + [9.0], phases=name, cursor=1000)  # as it is after a resume
    assert "spike at step 11" in said and "data.skip_samples=[[1080,1088]]" in said


def test_noise_is_no_spike() -> None:
    assert warnings([5.0 + 0.4 * (step % 3 - 1) for step in range(40)]) == []
    assert warnings([5.0 + 2.0 * (step % 3 - 1) for step in range(40)]) == []


def test_a_flat_loss_is_no_spike() -> None:
    assert warnings([9.0, 8.0, 7.0] + [6.0 + 0.05 * (step % 2) for step in range(60)]) == []


# ---- the plateau

ENTROPY = 6.0
Records = list[dict[str, Any]]


def validated(losses: list[float], every: int = 100) -> Records:
    """Records with a validation, as the loop has them."""
    steps = range(every, every * (len(losses) + 1), every)
    return [{"step": step, "valid_loss": loss, "context_use": 0.02} for step, loss in zip(steps, losses, strict=True)]


def watched(records: Records, warmup: int = 0, before: Records | None = None) -> list[str]:
    """What is said; the records are added to."""
    plateau = Plateau(ENTROPY, warmup, before or [], "this, that")
    return [line for record in records for line in plateau.look(record)]


def test_the_breakthrough_is_the_first_validation_one_nat_below_the_entropy() -> None:
    records = validated([6.5, 5.9, 5.01, 5.0, 5.2, 4.0])
    assert watched(records) == []
    assert [record["breakthrough_step"] for record in records] == [None, None, None, 400, 400, 400]
    assert [record["valid_gap"] for record in records] == pytest.approx([-0.5, 0.1, 0.99, 1.0, 0.8, 2.0])


@pytest.mark.parametrize("cut", [1, 3, 4, 5])
def test_a_breakthrough_is_known_across_a_resume(cut: int) -> None:
    """By the records of the run so far, those between validations among them."""
    whole = validated([6.5, 5.9, 5.01, 5.0, 5.2, 4.0])
    watched(whole)
    before = [dict(record) for record in whole[:cut]]
    before = [line for record in before for line in ({"step": record["step"] - 1, "loss": 5.0}, record)]
    before.append({"step": 10 * cut + 1, "valid_loss": None})
    after = validated([6.5, 5.9, 5.01, 5.0, 5.2, 4.0])[cut:]
    assert watched(after, before=before) == [] and after == whole[cut:]


def test_a_run_on_the_plateau_is_told_once() -> None:
    (said,) = watched(validated([6.1, 5.9, 5.85, 5.84, 5.83, 5.83, 5.82, 5.82]))
    assert said.startswith("WARNING: on the plateau: 3 validations brought less than 0.1 nats")
    assert "0.15 nats below the unigram entropy of 6.000" in said or "0.16 nats below" in said
    assert "context use 0.02" in said and said.endswith("what leaves it: this, that")
    assert "\n" not in said


def test_where_a_run_counts_as_flat() -> None:
    flat = [5.9, 5.85, 5.84]
    assert len(watched(validated(flat))) == 1, "three validations are enough"
    assert watched(validated(flat[:2])) == [], "two are not"
    assert watched(validated(flat), warmup=100) == [] and len(watched(validated(flat), warmup=99)) == 1
    assert watched(validated([5.9, 5.85, 5.78])) == [], "it moves"
    assert watched(validated([4.9, 4.9, 4.9, 4.9])) == [], "it has left the plateau"
    assert watched(validated([4.9, 5.5, 5.5, 5.5])) == [], "it had left the plateau"
    assert watched(validated([6.5, 6.6, 6.7])) == [], "it gets worse, which is another trouble"


def test_a_plateau_is_seen_across_a_resume() -> None:
    records = validated([5.9, 5.85, 5.84])
    assert len(watched(records[2:], before=records[:2])) == 1


def test_levers_are_those_not_yet_used() -> None:
    asked = {"model.family=modernbert", "optimizer.name=muon", "model.positions=sinusoidal", "schedule.full_start"}

    def named(recipe: str, *overrides: str) -> set[str]:
        text = levers(load_config(recipe, overrides))
        assert text.endswith("a higher optimizer.lr, or more steps")
        return {name for name in asked if name in text}

    assert named("bert-base-sctd") == asked
    assert named("bert-base-baseline") == asked - {"schedule.full_start"}
    assert named("bert-base-sctd", "schedule.full_start=5000", "optimizer.name=muon") == {
        "model.family=modernbert", "model.positions=sinusoidal",
    }  # fmt: skip
    assert named("modernbert-base-sctd") == set()
    assert named("modernbert-base-sctd", "optimizer.name=adamw") == {"optimizer.name=muon"}
    assert named("modernbert-base-sctd", "optimizer.name=adamw", "train.zero_stage=3") == set()
    assert named("demo") == set()
    assert named("demo-bert") == {"model.family=modernbert"}


def test_levers_are_keys_of_a_recipe() -> None:
    """What the warning names can be set as it says."""
    text = levers(config_from_dict({}))
    for part in text.split(", ")[:3]:
        load_config("bert-base-sctd", [part])
    assert "schedule.full_start" in text.split(", ")[3]


def test_spread_names_the_slowest() -> None:
    assert spread([1.0, 1.0, 3.0]) == {"rank_spread": 3.0, "slowest_rank": 2}
    assert spread([0.5]) == {"rank_spread": 1.0, "slowest_rank": 0}
    assert spread([0.0, 0.0])["rank_spread"] == 1.0

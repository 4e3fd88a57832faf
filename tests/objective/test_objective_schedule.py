"""Which phase and how many tokens an optimizer step has: functions of the step's number and nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest

from sctd.config import ObjectiveConfig, config_from_dict
from sctd.errors import UserError
from sctd.objective.arms import ARMS, KeepBy
from sctd.objective.build import build_hook
from sctd.objective.schedule import HybridScheduleHook, Phase


def make_hook(
    arm: str = "sctd",
    interval: int = 10,
    keep_ratio: float = 0.5,
    length: int = 512,
    steps: int = 10_000_000,
    full: tuple[int, int] = (0, 0),
) -> HybridScheduleHook:
    """full: full_start and full_finish."""
    tree = {
        "arm": arm,
        "model": {"keep_ratio": keep_ratio},
        "objective": {"interval": interval},
        "schedule": {"full_start": full[0], "full_finish": full[1]},
        "train": {"steps": steps},
    }
    return build_hook(config_from_dict(tree), length)


def call(hook: HybridScheduleHook, global_steps: int, training: bool = True, length: int = 512) -> tuple[Phase, int]:
    engine = SimpleNamespace(global_steps=global_steps, module=SimpleNamespace(training=training))
    ids = np.ones((2, length))
    args, kwargs = hook(engine, ("x",), {"labels": 1, "input_ids": ids})
    assert args == ("x",) and kwargs.pop("labels") == 1 and kwargs.pop("input_ids") is ids
    phase, keep = kwargs.pop("phase"), kwargs.pop("keep")
    assert not kwargs
    return phase, keep


def test_kept_tokens_follow_the_rows_of_the_step() -> None:
    """Whatever length the schedule was told: a warm-up trains on shorter rows."""
    hook = make_hook(length=512)
    assert [call(hook, 0, length=length)[1] for length in (512, 128, 64)] == [256, 64, 32]


@pytest.mark.parametrize("interval", [1, 2, 7, 10, 1000])
def test_align_at_multiples_of_the_interval(interval: int) -> None:
    hook = make_hook(interval=interval)
    last = 3 * interval + interval // 2
    aligned = [step for step in range(1, last + 1) if hook.phase(step) is Phase.ALIGN]
    assert aligned == [interval, 2 * interval, 3 * interval]
    assert hook.phase(interval + 1) is (Phase.ALIGN if interval == 1 else Phase.DROP)


def test_steps_are_counted_from_1() -> None:
    """The engine has made 9 steps: the one at work is the tenth."""
    hook = make_hook()
    phases = [call(hook, done)[0] for done in range(20)]
    assert [done for done in range(20) if phases[done] is Phase.ALIGN] == [9, 19]
    assert phases[0] is Phase.DROP


def test_all_micro_batches_of_a_step_share_the_phase() -> None:
    """However many forwards there are between two optimizer steps, also after a resume in between."""
    hook = make_hook()
    for done in (8, 9, 10):
        assert len({call(hook, done) for _ in range(7)}) == 1
        assert call(make_hook(), done) == call(hook, done)


@pytest.mark.parametrize("arm", ["token_drop", "random_drop", "random_ltd"])
def test_arms_without_alignment_drop_at_every_step(arm: str) -> None:
    assert {call(make_hook(arm), done)[0] for done in range(41)} == {Phase.DROP}


def test_baseline_is_full_at_every_step() -> None:
    assert {call(make_hook("baseline"), done)[0] for done in range(41)} == {Phase.FULL}


@pytest.mark.parametrize("arm", list(ARMS))
def test_evaluation_is_full(arm: str) -> None:
    assert {call(make_hook(arm), done, training=False)[0] for done in range(21)} == {Phase.FULL}


def test_number_of_kept_tokens_is_constant() -> None:
    assert {call(make_hook(), done)[1] for done in (0, 9, 500, 10**6)} == {256}


@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("length", [40, 128, 512])
def test_random_ltd_grows_to_the_whole_row(keep_ratio: float, length: int) -> None:
    steps = 777
    hook = make_hook("random_ltd", keep_ratio=keep_ratio, length=length, steps=steps)
    kept = [hook.keep(step) for step in range(1, steps + 1)]
    assert kept == sorted(kept), "it shrank"
    assert kept[-1] == length == hook.keep(steps + 50)
    assert abs(kept[0] - max(16, keep_ratio * length)) <= 9
    assert abs(kept[steps // 2] - (1 + keep_ratio) / 2 * length) <= 9, "it does not grow linearly"


# ---- full start and full finish


def letters(hook: HybridScheduleHook, steps: int) -> str:
    """The phases of a run's steps, by their first letters."""
    return "".join(hook.phase(step).value[0] for step in range(1, steps + 1))


@pytest.mark.parametrize(
    ("full", "phases"),
    [
        ((0, 0), "dddadddadddadddaddda"),
        ((5, 0), "fffffddadddadddaddda"),
        ((3, 0), "fffadddadddadddaddda"),  # the first step behind the start may be an ALIGN step
        ((4, 0), "ffffdddadddadddaddda"),
        ((0, 3), "dddadddadddadddadfff"),
        ((0, 5), "dddadddadddadddfffff"),
        ((5, 3), "fffffddadddadddadfff"),
        ((7, 12), "fffffffaffffffffffff"),
        ((19, 0), "fffffffffffffffffffa"),
    ],
)
def test_full_start_and_full_finish(full: tuple[int, int], phases: str) -> None:
    """They lie over the schedule: ALIGN stays where t mod F is 0, counted from the run's first step."""
    hook = make_hook(interval=4, steps=20, full=full)
    assert letters(hook, 20) == phases
    assert [call(hook, done)[0].value[0] for done in range(20)] == list(phases)
    assert {call(hook, done, training=False)[0] for done in range(20)} == {Phase.FULL}


@pytest.mark.parametrize("full", [(19, 1), (20, 0), (0, 20)])
def test_an_arm_that_would_never_drop_is_refused(full: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="no step would drop"):
        make_hook(interval=4, steps=20, full=full)
    assert letters(make_hook("baseline", steps=20, full=full), 20) == "f" * 20


def test_without_them_it_is_the_papers() -> None:
    hook = make_hook(interval=10, steps=250)
    assert letters(hook, 250) == ("d" * 9 + "a") * 25
    bare = HybridScheduleHook(True, 10, lambda step: 0.5, 512)
    assert letters(bare, 250) == letters(hook, 250)


@pytest.mark.parametrize("arm", ["token_drop", "random_drop", "random_ltd"])
def test_full_start_of_arms_without_alignment(arm: str) -> None:
    assert letters(make_hook(arm, interval=4, steps=20, full=(5, 3)), 20) == "f" * 5 + "d" * 12 + "f" * 3


def test_the_baseline_has_no_phases() -> None:
    hook = make_hook("baseline", steps=20, full=(5, 3))
    assert letters(hook, 20) == "f" * 20 and hook.phase.starts == [1]


def test_where_phases_begin() -> None:
    """What the cost of a run is counted by."""
    assert make_hook(steps=20, full=(5, 3)).phase.starts == [1, 6, 18]
    assert make_hook(steps=20, full=(12, 7)).phase.starts == [1, 13, 14]


def test_the_share_of_kept_tokens_grows_on_through_a_full_start() -> None:
    plain, late = (make_hook("random_ltd", steps=100, full=full) for full in ((0, 0), (30, 10)))
    assert [late.keep(step) for step in range(1, 101)] == [plain.keep(step) for step in range(1, 101)]
    assert len({plain.keep(step) for step in range(1, 101)}) > 5


# ---- arms


def test_arms_are_the_ones_of_the_method() -> None:
    assert set(ARMS) == {"baseline", "token_drop", "sctd", "random_drop", "random_ltd"}
    assert [name for name, arm in ARMS.items() if arm.aligns] == ["sctd"]
    assert [name for name, arm in ARMS.items() if not arm.drops] == ["baseline"]
    assert {name for name, arm in ARMS.items() if arm.keep_by is KeepBy.IMPORTANCE} == {"token_drop", "sctd"}


@pytest.mark.parametrize("switches", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_the_full_path_runs_only_where_a_term_needs_it(switches: tuple[int, int, int]) -> None:
    objective = ObjectiveConfig(**dict(zip(("mlm_full", "kl_global", "kl_local"), map(bool, switches), strict=True)))
    assert ARMS["sctd"].needs_full_path(objective) == any(switches)
    assert not ARMS["token_drop"].needs_full_path(objective)

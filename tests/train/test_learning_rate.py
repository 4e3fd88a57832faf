"""Learning-rate schedules at their corners."""

import math

import pytest

from sctd.config import ScheduleConfig
from sctd.schedule import learning_rate

PEAK, STEPS = 2e-4, 1000
NAMES = ("linear", "polynomial", "cosine", "wsd")


def rates(schedule: ScheduleConfig, steps: int = STEPS) -> list[float]:
    """Rates of all steps; index 0 is not used."""
    rate = learning_rate(schedule, PEAK, steps)
    return [math.nan] + [rate(step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [1, 100, STEPS])
def test_warm_up_is_linear_and_ends_at_the_peak(name: str, warmup: int) -> None:
    found = rates(ScheduleConfig(name, warmup_steps=warmup))
    for step in range(1, warmup + 1):
        assert found[step] == pytest.approx(PEAK * step / warmup, rel=1e-12)
    assert max(found[1:]) == found[warmup] == PEAK


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("final", [0.0, 1e-6])
@pytest.mark.parametrize("warmup", [0, 100])
def test_decay_ends_one_step_before_the_final_rate(name: str, final: float, warmup: int) -> None:
    """The last step trains too; one behind it would have the final rate."""
    schedule = ScheduleConfig(name, warmup, power=2.0, decay_steps=300, final_lr=final)
    found = rates(schedule)
    left = 1 / (STEPS + 1 - (700 if name == "wsd" else warmup))  # of the way, at the last step
    share = {"polynomial": left**2, "cosine": (1 - math.cos(math.pi * left)) / 2}.get(name, left)
    assert found[STEPS] == pytest.approx(final + (PEAK - final) * share, rel=1e-6) and found[STEPS] > final
    after = found[max(1, warmup) :]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False)), "it rises again"
    assert all(final < rate <= PEAK for rate in after)
    rate = learning_rate(schedule, PEAK, STEPS)
    assert rate(STEPS + 1) == rate(STEPS + 50) == pytest.approx(final, abs=1e-15)


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [
        (ScheduleConfig("linear", 200), 0.5),
        (ScheduleConfig("polynomial", 200, power=1.0), 0.5),
        (ScheduleConfig("polynomial", 200, power=2.0), 0.25),
        (ScheduleConfig("polynomial", 200, power=0.5), 0.5**0.5),
        (ScheduleConfig("cosine", 200), 0.5),
    ],
)
def test_half_way(schedule: ScheduleConfig, middle: float) -> None:
    """Step 600 lies half way between the warm-up's end at 200 and 1000, the step behind a horizon of 999."""
    assert learning_rate(schedule, PEAK, 999)(600) == pytest.approx(PEAK * middle)


def test_quarter_points_of_the_cosine() -> None:
    schedule = ScheduleConfig("cosine", final_lr=PEAK / 10)
    for step, share in ((250, 0.5 + math.sqrt(0.5) / 2), (750, 0.5 - math.sqrt(0.5) / 2)):
        assert learning_rate(schedule, PEAK, 999)(step) == pytest.approx(PEAK * (0.1 + 0.9 * share))


def test_warmup_stable_decay() -> None:
    found = rates(ScheduleConfig("wsd", warmup_steps=100, decay_steps=200, final_lr=PEAK / 2))
    assert set(found[100:801]) == {PEAK}
    for step in range(801, 1001):
        assert found[step] == pytest.approx(PEAK * (1 - 0.5 * (step - 800) / 201), rel=1e-12)


def test_warmup_stable_without_decay() -> None:
    assert set(rates(ScheduleConfig("wsd", warmup_steps=10))[10:]) == {PEAK}
    assert learning_rate(ScheduleConfig("wsd", warmup_steps=10), PEAK, STEPS)(STEPS + 50) == PEAK


@pytest.mark.parametrize("name", NAMES)
def test_a_decay_right_behind_the_warm_up(name: str) -> None:
    """The peak is reached and left at once, wherever it stands."""
    found = rates(ScheduleConfig(name, warmup_steps=100, decay_steps=900))
    assert found[99] < found[100] == PEAK > found[101] > 0


def test_stages_of_a_rate() -> None:
    rate = learning_rate(ScheduleConfig("wsd", warmup_steps=100, decay_steps=200), PEAK, STEPS)
    assert rate.starts == [1, 101, 801]
    assert rate(101) == rate(800) == PEAK


@pytest.mark.parametrize("name", ["linear", "polynomial", "cosine"])
def test_without_warm_up_it_starts_near_the_peak(name: str) -> None:
    first = learning_rate(ScheduleConfig(name), PEAK, STEPS)(1)
    assert 0.99 * PEAK < first <= PEAK


@pytest.mark.parametrize("name", NAMES)
def test_one_step(name: str) -> None:
    for warmup in (0, 1):
        for decay in (0, 1 - warmup):
            assert 0 < learning_rate(ScheduleConfig(name, warmup, decay_steps=decay), PEAK, 1)(1) <= PEAK


def test_the_papers_schedule() -> None:
    """25K steps up to 2e-4, then a straight line down, 225,001 steps to 0."""
    rate = learning_rate(ScheduleConfig("polynomial", 25_000, power=1.0), 2e-4, 250_000)
    assert rate(12_500) == pytest.approx(1e-4) and rate(25_000) == 2e-4
    assert rate(137_500) == pytest.approx(2e-4 * 112_501 / 225_001, rel=1e-12)
    assert rate(250_000) == pytest.approx(2e-4 / 225_001, rel=1e-9)
    assert rate(250_001) == 0.0

"""Learning-rate schedules at their corners."""

import math

import pytest

from sctd.config import ScheduleConfig
from sctd.train.learning_rate import learning_rate

PEAK, STEPS = 2e-4, 1000
NAMES = ("linear", "polynomial", "cosine", "wsd")


def rates(schedule: ScheduleConfig, steps: int = STEPS) -> list[float]:
    """Rates of all steps; index 0 is not used."""
    return [math.nan] + [learning_rate(schedule, PEAK, step, steps) for step in range(1, steps + 1)]


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
def test_decay_ends_at_the_final_rate(name: str, final: float, warmup: int) -> None:
    schedule = ScheduleConfig(name, warmup, power=2.0, decay_steps=300, final_lr=final)
    found = rates(schedule)
    assert found[STEPS] == pytest.approx(final, abs=1e-15)
    after = found[max(1, warmup) :]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False)), "it rises again"
    assert all(final <= rate <= PEAK for rate in after)
    assert learning_rate(schedule, PEAK, STEPS + 50, STEPS) == pytest.approx(final, abs=1e-15)


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
    """Step 600 lies half way between the warm-up's end at 200 and the horizon."""
    assert learning_rate(schedule, PEAK, 600, STEPS) == pytest.approx(PEAK * middle)


def test_quarter_points_of_the_cosine() -> None:
    schedule = ScheduleConfig("cosine", final_lr=PEAK / 10)
    for step, share in ((250, 0.5 + math.sqrt(0.5) / 2), (750, 0.5 - math.sqrt(0.5) / 2)):
        assert learning_rate(schedule, PEAK, step, STEPS) == pytest.approx(PEAK * (0.1 + 0.9 * share))


def test_warmup_stable_decay() -> None:
    found = rates(ScheduleConfig("wsd", warmup_steps=100, decay_steps=200, final_lr=PEAK / 2))
    assert set(found[100:801]) == {PEAK}
    assert found[801] < PEAK
    assert found[900] == pytest.approx(PEAK * 0.75) and found[1000] == pytest.approx(PEAK / 2)


def test_warmup_stable_without_decay() -> None:
    assert set(rates(ScheduleConfig("wsd", warmup_steps=10))[10:]) == {PEAK}


@pytest.mark.parametrize("name", ["linear", "polynomial", "cosine"])
def test_without_warm_up_it_starts_near_the_peak(name: str) -> None:
    first = learning_rate(ScheduleConfig(name), PEAK, 1, STEPS)
    assert 0.99 * PEAK < first <= PEAK


@pytest.mark.parametrize("name", NAMES)
def test_one_step(name: str) -> None:
    for warmup in (0, 1):
        for decay in (0, 1 - warmup):
            assert 0 <= learning_rate(ScheduleConfig(name, warmup, decay_steps=decay), PEAK, 1, 1) <= PEAK


def test_the_papers_schedule() -> None:
    """25K steps up to 2e-4, then a straight line to 0 at 250K."""
    schedule = ScheduleConfig("polynomial", 25_000, power=1.0)
    assert learning_rate(schedule, 2e-4, 12_500, 250_000) == pytest.approx(1e-4)
    assert learning_rate(schedule, 2e-4, 137_500, 250_000) == pytest.approx(1e-4)
    assert learning_rate(schedule, 2e-4, 250_000, 250_000) == 0.0

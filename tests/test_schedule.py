"""Functions of the optimizer step: stages and ramps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd.schedule import Schedule, ramp


def test_each_stage_holds_from_its_first_step_on() -> None:
    schedule = Schedule((1, "a"), (4, "b"), (6, "c"))
    assert "".join(schedule(step) for step in range(1, 9)) == "aaabbccc"
    assert schedule(10**12) == "c" and schedule.starts == [1, 4, 6]


def test_before_the_first_stage_the_first_one_holds() -> None:
    schedule = Schedule((5, "a"), (7, "b"))
    assert "".join(schedule(step) for step in range(-1, 8)) == "aaaaaaaab"


def test_of_stages_that_begin_together_the_last_one_holds() -> None:
    assert Schedule((1, "a"), (1, "b"))(1) == "b"
    assert "".join(Schedule((1, "a"), (3, "b"), (3, "c"))(step) for step in range(1, 5)) == "aacc"


def test_a_stage_may_be_a_function_of_the_step() -> None:
    """Of the step of the run, not of the stage."""
    schedule = Schedule((1, 7), (3, lambda step: 10 * step), (5, 0))
    assert [schedule(step) for step in range(1, 7)] == [7, 7, 30, 40, 0, 0]


def test_a_single_value() -> None:
    assert {Schedule((1, 0.15))(step) for step in (1, 2, 10**9)} == {0.15}


@settings(deadline=None, max_examples=60)
@given(starts=st.lists(st.integers(1, 40), min_size=1, max_size=6), steps=st.lists(st.integers(1, 50), max_size=8))
def test_stages_in_any_order(starts: list[int], steps: list[int]) -> None:
    """The stage of a step is the last of those that have begun, whatever order they were given in."""
    starts = list(dict.fromkeys(starts))
    schedule = Schedule(*((start, str(start)) for start in starts))
    assert schedule.starts == sorted(starts)
    for step in steps:
        begun = [start for start in starts if start <= step]
        assert schedule(step) == str(max(begun, default=min(starts)))


def test_a_ramp_is_a_straight_line_that_stays() -> None:
    value = ramp(10, 20, 1.0, 3.0)
    assert [value(step) for step in (-5, 0, 10)] == [1.0] * 3
    assert [value(step) for step in (15, 18)] == pytest.approx([2.0, 2.6])
    assert [value(step) for step in (20, 21, 10**9)] == [3.0] * 3, "not exactly where it should arrive"


def test_a_ramp_may_fall_and_have_a_shape() -> None:
    value = ramp(0, 10, 5.0, 1.0, lambda left: left**2)
    assert value(0) == 5.0 and value(5) == pytest.approx(1 + 4 * 0.25) and value(10) == 1.0


def test_a_ramp_of_no_steps_is_a_step() -> None:
    value = ramp(7, 7, 1.0, 2.0)
    assert value(7) == 1.0 and value(8) == 2.0

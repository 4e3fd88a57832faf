"""The order of samples: a permutation in each epoch, another one for each epoch and seed, the same cost anywhere."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd.data.order import Order, row_of_sample

SIZES = [1, 2, 3, 4, 5, 7, 16, 17, 128, 1000, 4096, 4097]


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("epoch", [0, 1, 12345])
def test_an_epoch_is_a_permutation(rows: int, epoch: int) -> None:
    order = row_of_sample(1, np.arange(rows) + epoch * rows, rows)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(rows))


@pytest.mark.parametrize("rows", [128, 1000, 4097])
def test_epochs_and_seeds_have_orders_of_their_own(rows: int) -> None:
    """Two random permutations agree in about 1 place; 12 or more happen once in 10**9."""
    orders = {(s, e): row_of_sample(s, np.arange(rows) + e * rows, rows) for s in (0, 1, 2, 77) for e in range(4)}
    orders["as they lie", 0] = np.arange(rows)
    agree = {
        (one, other): int((orders[one] == orders[other]).sum()) for one, other in itertools.combinations(orders, 2)
    }
    assert {pair: places for pair, places in agree.items() if places >= 12} == {}, "pairs of (seed, epoch)"


def test_small_epochs_differ_too() -> None:
    for rows in (2, 3):
        orders = {tuple(row_of_sample(1, np.arange(rows) + epoch * rows, rows).tolist()) for epoch in range(60)}
        assert len(orders) == {2: 2, 3: 6}[rows]


@pytest.mark.parametrize("rows", [7, 100])
def test_any_row_may_come_first(rows: int) -> None:
    """Over 4000 epochs each row opens about equally many."""
    count = 4000
    firsts = row_of_sample(5, np.arange(count) * rows, rows)
    sigma = (count / rows * (1 - 1 / rows)) ** 0.5
    assert np.abs(np.bincount(firsts, minlength=rows) - count / rows).max() < 4.5 * sigma


def test_neighbours_do_not_stay_together() -> None:
    order = row_of_sample(1, np.arange(4097), 4097)
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 expected of a random order
    assert abs(np.corrcoef(np.arange(4097), order)[0, 1]) < 0.08


@pytest.mark.parametrize("start", [10**9, 10**15])
def test_far_samples(start: int) -> None:
    rows = 1000
    sample = np.arange(start, start + 3 * rows)
    order = row_of_sample(3, sample, rows)
    for epoch in range(start // rows, start // rows + 3):
        inside = sample // rows == epoch
        assert sorted(order[inside].tolist()) == list(range(rows))
    assert np.array_equal(row_of_sample(3, sample[::-1], rows), order[::-1])


def test_entries_stand_alone() -> None:
    """Any subset, shape and mix of epochs gives the same entries."""
    sample = np.random.default_rng(0).integers(0, 10**12, (4, 5))
    whole = row_of_sample(9, sample, 777)
    assert whole.shape == (4, 5)
    assert whole.tolist() == [[int(row_of_sample(9, np.array([g]), 777)[0]) for g in line] for line in sample.tolist()]


def test_far_samples_cost_what_near_ones_cost() -> None:
    def seconds(start: int) -> float:
        best = float("inf")
        for _ in range(5):
            before = time.perf_counter()
            row_of_sample(1, np.arange(start, start + 2000), 10**6)
            best = min(best, time.perf_counter() - before)
        return best

    assert seconds(10**12) < 10 * seconds(0) + 0.01


def test_the_input_is_left_alone() -> None:
    sample = np.arange(10)
    row_of_sample(1, sample, 3)
    assert sample.tolist() == list(range(10))


# ---- mixtures


def test_without_weights_all_rows_are_one_permutation() -> None:
    sample = np.arange(500)
    assert np.array_equal(Order(7, (30, 70), (None, None))(sample), row_of_sample(7, sample, 100))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    data=st.data(),
    start=st.integers(0, 10**12),
    length=st.integers(1, 3000),
)
def test_any_window_holds_the_shares(rows: list[int], data: st.DataObject, start: int, length: int) -> None:
    count = data.draw(st.integers(1, len(rows)))
    weights = [data.draw(st.integers(1, 100)) / (100 * count + 1) for _ in range(count)]
    given_ = [round(weight, 3) or 0.001 for weight in weights] + [None] * (len(rows) - count)
    order = Order(1, rows, given_)
    named = sum(weight for weight in given_ if weight is not None)
    rest = sum(rows[count:])
    shares = [w / named if count == len(rows) else w for w in given_[:count]]
    shares += [(1 - named) * size / rest for size in rows[count:]]
    source, _ = order.source_of(np.arange(start, start + length))
    found = np.bincount(source, minlength=len(rows))
    assert np.abs(found - np.array(shares) * length).max() <= 2 + length / 2**15


def test_decimal_weights_are_exact() -> None:
    order = Order(1, (10, 1000), (0.7, 0.3))
    for start in (0, 10, 10**9):
        assert np.bincount(order.source_of(np.arange(start, start + 10))[0]).tolist() == [7, 3]
    order = Order(1, (10, 333, 667), (0.7, None, None))
    source, _ = order.source_of(np.arange(10**6))
    assert abs(np.mean(source == 0) - 0.7) < 1e-6 and abs(np.mean(source == 1) - 0.0999) < 1e-4


def test_tiny_sources_cost_the_largest_and_no_weight() -> None:
    """Each has a place in the pattern, though its share is less than one."""
    order = Order(1, (1000, 10**7, 1, 2, 1), (0.5, None, None, None, None))
    places = np.bincount(order.source_of(np.arange(1 << 16))[0])
    assert places.sum() == 1 << 16 and places[0] == 1 << 15 and places[2:].tolist() == [1, 1, 1]
    for start in (10**6, 10**12):
        found = np.bincount(order.source_of(np.arange(start, start + 10**6))[0], minlength=5)
        assert abs(found[0] - 500_000) <= 2


def test_a_source_without_rows_has_no_turn() -> None:
    for rows, weights, share in (
        ((10, 0), (0.3, None), 1.0),
        ((10, 30, 0), (0.2, 0.6, None), 0.25),
        ((10, 30, 0), (0.2, None, None), 0.2),
    ):
        order = Order(1, rows, weights)
        source, _ = order.source_of(np.arange(10_000))
        assert np.mean(source == 0) == pytest.approx(share) and source.max() <= 1
        assert order(np.arange(1000)).max() < sum(rows)


def test_each_source_is_gone_through_before_it_begins_again() -> None:
    rows = (13, 50, 7)
    order = Order(5, rows, (0.5, None, 0.2))
    sample = np.arange(5000)
    source, index = order.source_of(sample)
    found = order(sample)
    for number, (first, size) in enumerate(zip((0, 13, 63), rows, strict=True)):
        mine = found[source == number]
        assert index[source == number].tolist() == list(range(len(mine)))
        epochs = [mine[start : start + size] for start in range(0, len(mine) - size + 1, size)]
        assert all(sorted(epoch.tolist()) == list(range(first, first + size)) for epoch in epochs)
        assert size < 13 or len({tuple(epoch) for epoch in epochs}) == len(epochs), "each epoch has an order of its own"


def test_mixtures_are_drawn_entry_by_entry() -> None:
    order = Order(5, (100, 2000), (0.25, None))
    sample = np.random.default_rng(0).integers(0, 10**12, (4, 5))
    assert order(sample).tolist() == [[int(order(np.array([g]))[0]) for g in line] for line in sample.tolist()]

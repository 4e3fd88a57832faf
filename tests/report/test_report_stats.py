"""Tests of differences: against scipy and textbook values, and where there is nothing to test."""

import math

import pytest
from scipy import stats as scipy_stats

from sctd.present.table import mean_of, spread_of
from sctd.present.words import as_p
from sctd.report import paper
from sctd.report.scores import paper_average
from sctd.report.stats import holm, rank_correlation, two_shares, welch, wilcoxon


def test_welch_is_scipys() -> None:
    first, second = [0.61, 0.64, 0.60, 0.66], [0.55, 0.59, 0.57]
    found = welch(first, second)
    expected = scipy_stats.ttest_ind(first, second, equal_var=False)
    assert found.value == pytest.approx(0.6275 - 0.57)
    assert found.p == pytest.approx(expected.pvalue)
    # By hand: standard error and degrees of freedom after Welch and Satterthwaite.
    shares = [0.00075833333 / 4, 0.0004 / 3]
    error = math.sqrt(sum(shares))
    freedom = sum(shares) ** 2 / (shares[0] ** 2 / 3 + shares[1] ** 2 / 2)
    reach = scipy_stats.t.ppf(0.975, freedom) * error
    assert found.interval == pytest.approx((found.value - reach, found.value + reach), rel=1e-4)


@pytest.mark.parametrize(("first", "second"), [([0.5], [0.4, 0.5]), ([0.5], [0.4]), ([0.5, 0.5], [0.4, 0.4])])
def test_no_test_of_single_values_or_without_spread(first: list[float], second: list[float]) -> None:
    found = welch(first, second)
    assert found.p is found.interval is None
    assert found.value == pytest.approx(sum(first) / len(first) - sum(second) / len(second))
    assert as_p(found.p) == "no test"


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, None, 0.6]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_wilcoxon_is_scipys_and_passes_over_zeros() -> None:
    differences = [0.9, -0.2, 1.4, 0.6, 0.0, 2.2, 0.3]
    expected = scipy_stats.wilcoxon([each for each in differences if each]).pvalue
    assert wilcoxon(differences) == pytest.approx(expected) == pytest.approx(2 * 2 / 2**6)
    assert wilcoxon([0.0, 0.1]) is None


def test_rank_correlation_goes_through_all_orders() -> None:
    """Of 4 different pairs, 2 of the 24 orders are as extreme as the same one; scipy's t approximation says p = 0."""
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 50.0]) == pytest.approx((1.0, 2 / 24))
    first, second = [3.0, 1.0, 2.0, 5.0, 4.0, 4.0], [2.0, 1.0, 3.0, 6.0, 4.0, 5.0]
    found, p = rank_correlation(first, second)
    assert found == pytest.approx(scipy_stats.spearmanr(first, second).statistic)
    exact = scipy_stats.permutation_test(
        (second,), lambda order: scipy_stats.spearmanr(first, order).statistic, permutation_type="pairings",
        n_resamples=math.inf,
    )  # fmt: skip
    assert p == pytest.approx(exact.pvalue)
    assert all(map(math.isnan, rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])))


def test_two_shares() -> None:
    """300 and 270 right of 500: z = 0.06 / sqrt((0.6 x 0.4 + 0.54 x 0.46) / 500)."""
    found = two_shares(0.6, 0.54, 500)
    z = 0.06 / math.sqrt((0.24 + 0.2484) / 500)
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)))
    assert found.interval and found.interval[1] == pytest.approx(0.06 + 1.959964 * 0.06 / z, rel=1e-6)


def test_means_and_spreads() -> None:
    assert mean_of([1.0, 3.0]) == 2.0 and mean_of([]) is None and mean_of([1.0, None]) is None
    assert spread_of([1.0, 3.0]) == pytest.approx(math.sqrt(2)) and spread_of([1.0]) is None


# ---- the paper's numbers hang together -----------------------------------------------------------------------------


def test_the_papers_averages_are_those_of_its_scores() -> None:
    """A slip in one of its scores here would show in the average that it prints."""
    rows = [(layout, row) for layout in paper.LAYOUTS for row in layout.rows if row.average is not None]
    assert len(rows) == 13
    for layout, row in rows:
        assert paper_average(row, layout, layout.columns) == pytest.approx(row.average, abs=0.011), row


def test_the_papers_scores_have_its_digits() -> None:
    squad = next(column for column in paper.QUESTIONS.columns if column.task == "squad2")  # 79.16, 81.50, ...
    assert paper.QUESTIONS.digits(squad) == 2 and {*map(paper.GLUE.digits, paper.GLUE.columns)} == {1}


def test_the_papers_savings_are_those_of_its_hours() -> None:
    for layout in paper.LAYOUTS:
        for row in layout.rows:
            whole = next(r.hours for r in layout.rows if (r.size, r.arm) == (row.size, "baseline"))
            if row.saving is not None and row.hours and whole:
                assert 1 - row.hours / whole == pytest.approx(row.saving, abs=0.006), row
    whole = paper.INTERVALS["baseline"][0]
    assert whole == 4.93
    for hours, saving, *_ in paper.INTERVALS.values():
        assert hours and (saving is None or 1 - hours / whole == pytest.approx(saving, abs=0.001))

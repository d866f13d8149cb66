"""Estimates and their errors, by numbers worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.evaluation.estimates import UNKNOWN, Estimate, accuracy, accuracy_change, growth, mean, ratio


def test_an_interval_is_1_96_standard_errors_to_either_side_unless_it_was_measured() -> None:
    assert (Estimate(0.5, 0.1).low, Estimate(0.5, 0.1).high) == pytest.approx((0.304, 0.696), abs=1e-4)
    assert (Estimate(0.5, 0.1, (0.4, 0.9)).low, Estimate(0.5, 0.1, (0.4, 0.9)).high) == (0.4, 0.9)


@pytest.mark.parametrize("estimate", [UNKNOWN, Estimate(3.0, math.inf)])
def test_what_is_not_known_has_no_bounds(estimate: Estimate) -> None:
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


def test_accuracy_counts_ties_half_and_its_error_is_agresti_coulls() -> None:
    # 2 hits, 1 tie, 1 miss: 2.5 of 4; with two hits and two misses added 4.5 of 8: sqrt(.5625 * .4375 / 8)
    estimate = accuracy([1.0, 2.0, 0.0, -3.0])
    assert estimate.value == 0.625
    assert estimate.standard_error == pytest.approx(0.175390, abs=1e-6)


def test_all_right_on_few_pairs_is_not_certain() -> None:
    # 18 of 20: sqrt(.9 * .1 / 20)
    assert accuracy(np.ones(16)).standard_error == pytest.approx(0.067082, abs=1e-6)


def test_pairs_on_which_both_agree_cancel_in_the_change() -> None:
    # hits change by 1, 0, 0, -1, 1, 0: sum 1, squares 3; (3 + 1 - 1 / 8) / 64
    new, old = [1, 1, -1, -1, 1, 1], [-1, 1, -1, 1, -1, 1]
    estimate = accuracy_change(new, old)
    assert estimate.value == pytest.approx(1 / 6)
    assert estimate.standard_error == pytest.approx(math.sqrt(3.875) / 8)


def test_no_change_on_sixteen_pairs_has_an_error_of_a_point_in_eighteen() -> None:
    assert accuracy_change(np.ones(16), np.ones(16)) == Estimate(0.0, 1 / 18)


def test_growth_is_a_ratio_of_means_with_the_error_of_paired_residuals() -> None:
    # means 30 and 20: ratio 1.5; residuals 10 - 15, 50 - 45 = -5, 5: standard deviation sqrt(50), / sqrt(2) / 20
    assert growth([10, 50], [10, 30]) == Estimate(0.5, pytest.approx(0.25))


def test_a_ratio_weighs_long_answers_more() -> None:
    # 6 nats over 12 tokens; residuals 1 - 1, 5 - 5: no spread
    assert ratio([1, 5], [2, 10]) == Estimate(0.5, pytest.approx(0.0))
    assert math.isnan(ratio([], []).value) and math.isnan(ratio([1.0], [0]).value)


def test_growth_of_the_same_factor_everywhere_has_no_error() -> None:
    assert growth([20, 60, 6], [10, 30, 3]) == Estimate(pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=20))
def test_growth_from_nothing_is_unknown_and_from_itself_is_zero(values: list[float]) -> None:
    assert math.isnan(growth(values, np.zeros(len(values))).value)
    if np.mean(values) > 0:
        assert growth(values, values).value == 0


def test_the_mean_of_one_value_has_no_known_error() -> None:
    assert mean([3.0]) == Estimate(3.0, math.inf)
    assert mean([1.0, 3.0]) == Estimate(2.0, 1.0)


def test_the_interval_of_an_accuracy_lies_between_nothing_and_all() -> None:
    # 16 of 16: (16 + 2) / (16 + 4) = 0.9, and sqrt(0.9 x 0.1 / 20) = 0.0671.
    all_right = accuracy(np.ones(16))
    assert (all_right.value, all_right.high) == (1.0, 1.0)
    assert all_right.low == pytest.approx(0.9 - 1.96 * 0.0671, abs=1e-3)
    # 14 of 16: 16 / 20 = 0.8, and sqrt(0.8 x 0.2 / 20) = 0.0894.
    most = accuracy([1] * 14 + [-1] * 2)
    assert (most.low, most.high) == (pytest.approx(0.6247, abs=1e-3), pytest.approx(0.9753, abs=1e-3))

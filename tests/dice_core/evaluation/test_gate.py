"""The decision to accept a policy, and the estimates it rests on, by numbers worked by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.evaluation.estimates import Estimate, accuracy, accuracy_change, growth, mean
from dice_core.evaluation.gate import Findings, decide
from dice_core.evaluation.settings import EvaluationConfig

CONFIG = EvaluationConfig(max_accuracy_drop=0.05, max_length_growth=0.5)
FINE = Findings(
    accuracy=0.62,
    accuracy_previous=0.6,
    accuracy_change=Estimate(0.02, 0.02),
    margin=1.5,
    margin_previous=1.0,
    length_growth=Estimate(0.1, 0.1),
    num_answers=16,
    num_distinct_answers=16,
    share_empty=0.0,
    share_cut=0.0,
    share_cut_previous=0.0,
)


def test_a_policy_within_the_bounds_is_accepted_without_a_word() -> None:
    gate = decide(FINE, CONFIG)
    assert (gate.accepted, gate.reasons, gate.warnings) == (True, (), ())
    assert gate.improved and gate.promotable
    assert gate.reason == "accuracy 60.0% -> 62.0% (+2.0 +/- 2.0 points)"


def test_a_fall_within_the_bounds_goes_on_and_is_not_promoted() -> None:
    fall = replace(FINE, accuracy=0.8125, accuracy_previous=0.875, accuracy_change=Estimate(-0.0625, 0.051))
    gate = decide(fall, CONFIG)
    assert (gate.accepted, gate.improved, gate.promotable) == (True, False, False)
    assert gate.reason == "no gain: accuracy 87.5% -> 81.2% (-6.2 +/- 5.1 points)"


@pytest.mark.parametrize(("margin", "improved"), [(1.5, True), (1.0, False), (0.5, False)])
def test_where_accuracy_ties_the_margin_decides(margin: float, improved: bool) -> None:
    tie = replace(FINE, accuracy=0.6, accuracy_change=Estimate(0.0, 0.05), margin=margin)
    gate = decide(tie, CONFIG)
    assert gate.accepted and gate.improved == improved
    assert f"accuracy 60.0% as before, margin +1 -> {margin:+.3g} nats" in gate.reason


def test_a_policy_that_is_better_and_refused_is_not_promoted() -> None:
    gate = decide(replace(FINE, length_growth=Estimate(0.8, 0.1)), CONFIG)
    assert gate.improved and not gate.promotable
    assert gate.reason.startswith("answers grew by 80.0%")


def test_a_drop_beyond_the_bound_by_more_than_two_errors_is_refused() -> None:
    gate = decide(replace(FINE, accuracy_change=Estimate(-0.12, 0.03)), CONFIG)
    assert not gate.accepted
    assert gate.reasons == (
        "held-out reward accuracy fell by 12.0 points (standard error 3.0), "
        "evaluation.max_accuracy_drop allows 5.0 points",
    )


def test_a_drop_beyond_the_bound_by_less_is_accepted_with_a_warning() -> None:
    gate = decide(replace(FINE, accuracy_change=Estimate(-0.12, 0.04)), CONFIG)
    assert gate.accepted
    assert len(gate.warnings) == 1 and "beyond by less than two standard errors" in gate.warnings[0]


def test_growth_is_bounded_in_one_direction_only() -> None:
    assert not decide(replace(FINE, length_growth=Estimate(0.8, 0.1)), CONFIG).accepted
    assert decide(replace(FINE, length_growth=Estimate(-0.8, 0.1)), CONFIG).accepted


def test_one_answer_tells_nothing_about_growth() -> None:
    gate = decide(replace(FINE, length_growth=Estimate(3.0, math.inf)), CONFIG)
    assert gate.accepted and "standard error unknown" in gate.warnings[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share_empty": 0.75}, "75% of its answers are empty"),
        ({"num_distinct_answers": 1}, "one and the same answer to all 16 prompts"),
        ({"share_cut": 1.0, "share_cut_previous": 0.25}, "none of its answers ends before the token limit"),
        ({"num_non_finite_pairs": 2}, "log-probs of 2 held-out pairs are not finite"),
    ],
)
def test_degenerate_output_is_refused(change: dict[str, float], words: str) -> None:
    gate = decide(replace(FINE, **change), CONFIG)
    assert not gate.accepted and words in gate.reason


def test_a_token_limit_that_cuts_both_policies_is_a_warning_and_no_reason() -> None:
    gate = decide(replace(FINE, share_cut=1.0, share_cut_previous=0.875), CONFIG)
    assert gate.accepted and "cuts 100% of the answers (88% of the previous policy's)" in gate.warnings[0]


def test_what_could_not_be_measured_is_said() -> None:
    unknown = Estimate(math.nan, math.inf)
    gate = decide(replace(FINE, accuracy_change=unknown, length_growth=unknown), CONFIG)
    assert gate.accepted and len(gate.warnings) == 2
    assert not gate.promotable and gate.reason == "no gain: no held-out pair could be compared"


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

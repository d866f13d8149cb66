"""The decision, by numbers worked by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dice_core.evaluation.estimates import UNKNOWN, Estimate
from dice_core.evaluation.gate import Changes, Findings, Gate, Judged, decide
from dice_core.evaluation.settings import EvaluationConfig

CONFIG = EvaluationConfig(max_accuracy_drop=0.05, max_length_growth=0.5, max_cut_growth=0.2, max_drift_per_token=0.5)
FINE = Findings(
    accuracy=0.66,
    accuracy_incumbent=0.6,
    incumbent=Changes(Estimate(0.06, 0.02), Estimate(0.1, 0.1), Estimate(0.0, 0.05), share_cut=0.1),
    drift=Estimate(0.05, 0.01),
    share_cut=0.1,
    share_empty=0.0,
    num_answers=1024,
    num_distinct_answers=1024,
    num_pairs=1100,
    detectable_difference=0.056,
    num_needed=2156,
)
JUDGED = replace(
    FINE,
    num_prompts=1000,
    judged=Judged(Estimate(0.55, 0.013), Estimate(0.54, 0.013), 1.0),
    detectable_difference=0.0364,
    num_needed=829,
)


def against(findings: Findings, **changes: Any) -> Findings:
    """Return findings with other changes against the incumbent."""
    return replace(findings, incumbent=replace(findings.incumbent, **changes))


def judged(win_rate: Estimate, length_controlled: Estimate, **others: float) -> Gate:
    return decide(replace(JUDGED, judged=Judged(win_rate, length_controlled, others.get("share_parsed", 1.0))), CONFIG)


def test_a_candidate_whose_accuracy_rises_by_more_than_chance_is_better_where_nobody_judges() -> None:
    gate = decide(FINE, CONFIG)
    assert (gate.outcome, gate.accepted, gate.promotable, gate.warnings) == ("better", True, True, ())
    assert gate.reason == "better: held-out accuracy 60.0 % -> 66.0 % (+6.0 points (+2.1 to +9.9), 1100 pairs)"
    assert [rule.passed for rule in gate.rules] == [True] * len(gate.rules)
    assert gate.power == (
        "1,100 held-out pairs show a difference of 5.6 points in 80 % of runs, 4 points would take 2,156"
    )


def test_a_gain_has_to_be_larger_for_the_best_of_several_candidates() -> None:
    """Two-sided 5 % of five is 1 % of each: 2.576 standard errors, 6.0 - 5.2 points at two and 6.0 - 7.7 at three."""
    several = CONFIG.model_copy(update={"num_candidates": 5})
    gate = decide(FINE, several)
    assert (gate.outcome, gate.promotable) == ("better", True)
    assert gate.reason == (
        "better: held-out accuracy 60.0 % -> 66.0 % (+6.0 points (+0.8 to +11.2), 1100 pairs, one of 5 candidates)"
    )
    less_sure = against(FINE, accuracy=Estimate(0.06, 0.03))
    assert (decide(less_sure, CONFIG).outcome, decide(less_sure, several).outcome) == ("better", "not shown")
    # Nor is a guard any laxer, or stricter, for the others.
    assert gate.rules[1:] == decide(FINE, CONFIG).rules[1:]


def test_both_arms_of_a_judges_intervals_grow() -> None:
    several = CONFIG.model_copy(update={"num_candidates": 5})
    found = Judged(Estimate(0.55, 0.02, (0.52, 0.6)), Estimate(0.54, 0.02, (0.5001, 0.58)), 1.0)
    gate = decide(replace(JUDGED, judged=found), several)
    rule, factor = gate.rule("win_rate"), 2.5758293 / 1.9599640
    assert (rule.low, rule.high) == (pytest.approx(0.55 - 0.03 * factor), pytest.approx(0.55 + 0.05 * factor))
    assert gate.outcome == "not shown"


def test_the_best_of_several_unchanged_candidates_is_promoted_in_one_of_forty_runs_at_most() -> None:
    """Without the correction it would be one of nine."""
    random = np.random.default_rng(4)
    for num_candidates, limit in ((5, 0.03), (1, 0.14)):
        config = CONFIG.model_copy(update={"num_candidates": num_candidates})
        promoted = sum(
            any(decide(against(FINE, accuracy=Estimate(change, 0.02)), config).promotable for change in changes)
            for changes in random.normal(0, 0.02, (2000, 5)).tolist()
        )
        assert limit / 2 < promoted / 2000 < limit


def test_a_gain_within_chance_is_not_shown_and_the_reason_says_what_would_show_it() -> None:
    few = replace(against(FINE, accuracy=Estimate(0.0625, 0.077)), num_pairs=16, detectable_difference=0.216)
    gate = decide(replace(few, accuracy=0.8125, accuracy_incumbent=0.75, num_needed=465), CONFIG)
    assert (gate.outcome, gate.accepted, gate.promotable) == ("not shown", True, False)
    assert gate.rule("accuracy_gain").passed is None
    assert gate.reason == (
        "not shown: held-out accuracy 75.0 % -> 81.2 % (+6.2 points (-8.8 to +21.3), 16 pairs); "
        "16 held-out pairs show a difference of 21.6 points in 80 % of runs, 4 points would take 465"
    )


def test_a_fall_beyond_chance_within_the_bound_goes_on_and_is_worse() -> None:
    gate = decide(against(FINE, accuracy=Estimate(-0.04, 0.01)), CONFIG)
    assert (gate.outcome, gate.accepted, gate.promotable) == ("worse", True, False)
    assert gate.rule("accuracy_gain").passed is False


def test_a_win_rate_and_one_at_equal_lengths_above_one_half_are_better() -> None:
    gate = decide(JUDGED, CONFIG)
    assert (gate.outcome, gate.promotable) == ("better", True)
    assert gate.reason == (
        "better: win rate 55.0 % (52.5 to 57.5, 1,000 prompts), at equal lengths 54.0 % (51.5 to 56.5)"
    )
    assert "accuracy_gain" not in [rule.name for rule in gate.rules]


@pytest.mark.parametrize(
    ("win_rate", "length_controlled", "outcome"),
    [
        (Estimate(0.52, 0.013), Estimate(0.54, 0.013), "not shown"),
        (Estimate(0.55, 0.013), Estimate(0.51, 0.013), "not shown"),
        (Estimate(0.45, 0.013), Estimate(0.49, 0.013), "worse"),
        (Estimate(0.49, 0.013), Estimate(0.45, 0.013), "worse"),
        # Preferred for its length alone: neither is the whole truth.
        (Estimate(0.60, 0.013), Estimate(0.45, 0.013), "not shown"),
        (UNKNOWN, UNKNOWN, "not shown"),
    ],
)
def test_both_win_rates_decide(win_rate: Estimate, length_controlled: Estimate, outcome: str) -> None:
    gate = judged(win_rate, length_controlled)
    assert (gate.outcome, gate.promotable) == (outcome, False)
    assert gate.reason.startswith(f"{outcome}: win rate")


def test_a_judge_decides_where_there_is_one_whatever_the_implicit_reward_says() -> None:
    gate = decide(against(JUDGED, accuracy=Estimate(-0.01, 0.02)), CONFIG)
    assert gate.outcome == "better" and gate.promotable


@pytest.mark.parametrize(("share", "promotable"), [(0.95, True), (0.949, False), (math.nan, False)])
def test_a_judge_that_fails_too_often_bars_a_promotion_and_refuses_nobody(share: float, promotable: bool) -> None:
    gate = judged(Estimate(0.55, 0.013), Estimate(0.54, 0.013), share_parsed=share)
    assert (gate.outcome, gate.accepted, gate.promotable) == ("better", True, promotable)
    if not promotable:
        assert gate.reason.startswith("better, not promoted: the judge gave a verdict on")


def test_a_drop_beyond_the_bound_with_its_whole_interval_is_refused() -> None:
    gate = decide(against(FINE, accuracy=Estimate(-0.12, 0.03)), CONFIG)
    assert not gate.accepted
    assert gate.reason == (
        "held-out reward accuracy fell by 12.0 points (6.1 to 17.9), evaluation.max_accuracy_drop allows 5.0 points"
    )


def test_a_drop_beyond_the_bound_by_less_is_accepted_with_a_warning() -> None:
    gate = decide(against(JUDGED, accuracy=Estimate(-0.12, 0.04)), CONFIG)
    assert gate.accepted and gate.outcome == "better" and not gate.promotable
    assert gate.rule("accuracy_drop").passed is None
    assert len(gate.warnings) == 1 and "beyond by less than chance; not promoted either" in gate.warnings[0]


@pytest.mark.parametrize(
    ("change", "broken", "words"),
    [
        ({"length": Estimate(0.8, 0.1)}, "length_growth", "answers grew by 80.0% (60.4 to 99.6)"),
        (
            {"cut": Estimate(0.5, 0.1)},
            "cut_answers",
            "the token limit cuts 10.0 % of the answers (the incumbent's 10.0 %), more by 50.0 points (30.4 to 69.6)",
        ),
        ({"drift": Estimate(0.8, 0.1)}, "drift", "drift from the first policy is 0.8 nats per token (0.604 to 0.996)"),
        ({"share_empty": 0.75}, "empty_answers", "75% of its answers are empty"),
        ({"num_distinct_answers": 1}, "distinct_answers", "one and the same answer to all 1024 prompts"),
        ({"num_non_finite_pairs": 2}, "finite_log_probs", "log-probs of 2 held-out pairs are not finite"),
        ({"broken_weights": "tensor 'x' is broken"}, "finite_weights", "tensor 'x' is broken"),
    ],
)
def test_a_broken_guard_refuses_a_better_candidate_and_names_itself(
    change: dict[str, Any], broken: str, words: str
) -> None:
    changed = against(JUDGED, **change) if set(change) <= {"length", "cut"} else replace(JUDGED, **change)
    gate = decide(changed, CONFIG)
    assert (gate.outcome, gate.accepted, gate.promotable) == ("better", False, False)
    assert [rule.name for rule in gate.rules if rule.passed is False] == [broken]
    assert words in gate.reason


def test_shorter_answers_and_fewer_cut_ones_are_welcome() -> None:
    assert decide(against(FINE, length=Estimate(-0.8, 0.1), cut=Estimate(-0.5, 0.1)), CONFIG).promotable


def test_one_answer_tells_nothing_about_growth() -> None:
    gate = decide(against(FINE, length=Estimate(3.0, math.inf)), CONFIG)
    assert gate.accepted and not gate.promotable and "interval unknown" in gate.warnings[0]


def test_few_prompts_with_one_answer_are_no_proof_of_a_broken_candidate() -> None:
    assert decide(replace(FINE, num_answers=3, num_distinct_answers=1), CONFIG).accepted
    assert not decide(replace(FINE, num_answers=4, num_distinct_answers=1), CONFIG).accepted


def test_a_token_limit_that_cuts_both_models_is_a_warning_and_no_reason() -> None:
    gate = decide(replace(against(FINE, share_cut=0.875), share_cut=1.0), CONFIG)
    assert gate.promotable and "cuts 100% of the answers (88% of the incumbent's)" in gate.warnings[0]


def test_what_could_not_be_measured_is_said_and_never_promoted() -> None:
    gate = decide(replace(against(FINE, accuracy=UNKNOWN, length=UNKNOWN), drift=UNKNOWN), CONFIG)
    assert gate.accepted and not gate.promotable
    assert gate.outcome == "not shown" and gate.reason.startswith("not shown: held-out accuracy: no pair could be")
    assert [warning.endswith("?: not measured") for warning in gate.warnings] == [True] * 3
    assert gate.rule("length_growth").value is None


FAR_AHEAD = Changes(Estimate(-0.3, 0.02), Estimate(1.5, 0.1), Estimate(0.0, 0.05), share_cut=0.1)
"""Against an incumbent that several iterations of another run made."""


def test_a_young_run_goes_on_however_far_it_is_from_a_promoted_model_of_another_run() -> None:
    gate = decide(replace(FINE, incumbent=FAR_AHEAD, previous=FINE.incumbent), CONFIG)
    assert (gate.outcome, gate.accepted, gate.promotable) == ("worse", True, False)
    assert gate.rule("accuracy_drop").passed and gate.rule("length_growth").passed
    assert gate.rule("incumbent_accuracy_drop").passed is gate.rule("incumbent_length_growth").passed is False
    assert gate.rule("incumbent_length_growth").sentence.startswith("answers against the incumbent grew by 150.0%")


def test_a_candidate_that_is_better_and_much_longer_than_the_incumbent_goes_on_and_is_not_promoted() -> None:
    longer = replace(JUDGED.incumbent, length=Estimate(0.8, 0.1))
    gate = decide(replace(JUDGED, incumbent=longer, previous=JUDGED.incumbent), CONFIG)
    assert (gate.outcome, gate.accepted, gate.promotable) == ("better", True, False)
    assert gate.reason.startswith("better, not promoted: answers against the incumbent grew by 80.0%")


def test_a_guard_against_the_previous_policy_refuses_whatever_the_incumbent_was() -> None:
    worse = replace(FINE.incumbent, accuracy=Estimate(-0.2, 0.02))
    gate = decide(replace(FINE, previous=worse), CONFIG)
    assert (gate.outcome, gate.accepted, gate.promotable) == ("better", False, False)
    assert gate.reason.startswith("held-out reward accuracy against the previous policy fell by 20.0 points")

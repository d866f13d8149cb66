"""What verdicts mean: pure values, the same from either side to the last bit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.judges.judging import verdict_of, verdict_of_rewards
from dice_core.judges.verdicts import MISSING, TIE, Verdict, preference_of_rewards

REWARDS = st.floats(allow_nan=False, width=32)
PAIRS = st.tuples(REWARDS, REWARDS)


@pytest.mark.parametrize(
    ("rewards", "preference"),
    [((2.0, 2.0), 0.5), ((math.log(3), 0.0), 0.75), ((0.0, math.log(3)), 0.25), ((1e4, -1e4), 1.0), ((-1e4, 1e4), 0.0)],
)
def test_a_preference_is_the_sigmoid_of_the_difference_of_rewards(
    rewards: tuple[float, float], preference: float
) -> None:
    assert preference_of_rewards(*rewards) == pytest.approx(preference, abs=1e-12)


def test_rewards_that_are_no_numbers_prefer_nothing() -> None:
    assert preference_of_rewards(math.nan, 0) is preference_of_rewards(math.inf, math.inf) is None
    assert preference_of_rewards(0, -math.inf) == 1
    assert verdict_of_rewards(None, 1.0) == verdict_of_rewards(1.0, None) == MISSING


@given(st.lists(st.tuples(PAIRS, PAIRS), min_size=1, max_size=64))
def test_swapping_the_models_turns_the_sum_of_preferences_into_what_is_left_exactly(
    judged: list[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    """Of a judge whose rewards or log-probs depend on the place: what it sees in one order, it sees swapped again."""
    seen = [(preference_of_rewards(*first), preference_of_rewards(*second)) for first, second in judged]
    verdicts = [verdict_of(*pair) for pair in seen if None not in pair]
    swapped = [verdict_of(second, first) for first, second in seen if None not in (first, second)]
    assert swapped == [verdict.swapped() for verdict in verdicts]
    total = sum(verdict.preference or 0 for verdict in verdicts)
    assert sum(verdict.preference or 0 for verdict in swapped) == len(verdicts) - total


def test_a_judge_that_always_says_a_prefers_nobody_and_always_flips() -> None:
    verdict = verdict_of(1.0, 1.0)
    assert (verdict, verdict.preference, verdict.flipped) == (Verdict(1.0, 0.0), 0.5, True)


@pytest.mark.parametrize(
    ("verdict", "preference", "flipped"),
    [
        (Verdict(1.0, 0.6), 0.8, False),
        (Verdict(0.9, 0.4), 0.65, True),
        (Verdict(0.5, 0.9), 0.7, False),
        (TIE, 0.5, False),
        (Verdict(1.0, None), None, None),
        (Verdict(None, 0.0), None, None),
        (MISSING, None, None),
    ],
)
def test_both_orders_count_and_one_of_them_alone_is_missing(
    verdict: Verdict, preference: float | None, flipped: bool | None
) -> None:
    assert (verdict.preference, verdict.flipped) == (pytest.approx(preference) if preference else None, flipped)
    assert verdict.swapped().swapped() == verdict

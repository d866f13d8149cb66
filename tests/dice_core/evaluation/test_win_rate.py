"""Win rates, their intervals and what they can show: by hand, against scipy, and in simulations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.evaluation.win_rate import (
    ADDED,
    Tally,
    detectable_difference,
    flip_rate,
    num_needed,
    percentile_interval,
    resample_counts,
    sign_test,
    spread_of,
    tally,
    win_rate,
)
from tests.peer_statistics import ask

NUM_SIMULATIONS = 2000
PREFERENCES = st.lists(st.integers(0, 16).map(lambda value: value / 16), min_size=1, max_size=40)


def test_a_tie_is_half_a_win() -> None:
    assert win_rate([1, 1, 0.5, 0], seed=0).value == 0.625
    assert tally([1, 0.7, 0.5, 0.2]) == Tally(wins=2, ties=1, losses=1)


def test_a_judge_that_changes_its_mind_with_the_order_gives_a_tie_whatever_the_mean_says() -> None:
    assert tally([0.9, 0.6, 0.4], [False, True, True]) == Tally(wins=1, ties=2, losses=0)


def test_no_preference_is_no_win_rate() -> None:
    assert math.isnan(win_rate([], seed=0).value) and win_rate([], seed=0).low == -math.inf


@given(PREFERENCES)
def test_swapping_the_models_turns_a_win_rate_into_one_minus_it(preferences: list[float]) -> None:
    swapped = win_rate([1 - value for value in preferences], seed=3)
    assert swapped.value == 1 - win_rate(preferences, seed=3).value


@given(PREFERENCES)
def test_an_interval_holds_its_value(preferences: list[float]) -> None:
    found = win_rate(preferences, seed=5)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert win_rate(values, seed=1) == win_rate(values, seed=1) != win_rate(values, seed=2)


def test_all_of_few_prompts_won_is_not_certain() -> None:
    """With 2 wins and 2 losses added, a fortieth of the resamples has 4 of 8 at most; of 16 prompts, 15 of 20."""
    assert win_rate([1] * 4, seed=0).low <= 0.5
    assert win_rate([1] * 16, seed=0).low == pytest.approx(0.75, abs=0.05)


def test_several_verdicts_on_a_prompt_tell_as_much_as_one() -> None:
    """Copies of a prompt's verdict: as prompts of their own they would halve the interval."""
    values = np.random.default_rng(0).integers(0, 2, 100)
    prompts = np.tile(np.arange(100), 4)
    once, often = win_rate(values, seed=7), win_rate(np.tile(values, 4), prompts.tolist(), seed=7)
    assert (often.value, often.interval) == (once.value, once.interval)
    as_own = win_rate(np.tile(values, 4), seed=7)
    assert as_own.high - as_own.low < 0.6 * (once.high - once.low)


@pytest.mark.parametrize("size", [100, 300, 805])
@pytest.mark.parametrize("chances", [(0.5, 0.0, 0.5), (0.35, 0.3, 0.35), (0.5, 0.3, 0.2)])
def test_intervals_hold_the_truth_in_95_of_100_simulations(size: int, chances: tuple[float, float, float]) -> None:
    """What win_rate does, for all simulations at once: the resamples are the same in each."""
    draws = np.random.default_rng(size).choice([1, 0.5, 0], p=chances, size=(NUM_SIMULATIONS, size))
    everything = np.hstack([draws, np.tile(ADDED, (NUM_SIMULATIONS, 1))])
    rates = resample_counts(size + len(ADDED), 7, 1000) @ everything.T / (size + len(ADDED))  # (resamples, simulations)
    low, high = np.percentile(rates, (2.5, 97.5), axis=0)
    truth = chances[0] + chances[1] / 2
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97


def test_the_simulated_interval_is_that_of_win_rate() -> None:
    values = np.random.default_rng(0).random(30)
    counts = resample_counts(34, 9)
    rates = counts @ np.concatenate([values, ADDED]) / 34
    assert win_rate(values, seed=9).interval == pytest.approx(percentile_interval(rates))


@pytest.mark.slow
def test_the_sign_test_is_scipys() -> None:
    counts = [(wins, losses) for wins in range(0, 41, 4) for losses in (0, 1, 2, 3, 10, 17, 40)]
    counts = [count for count in counts if any(count)] + [(420, 385), (1, 1000)]
    for (wins, losses), expected in zip(counts, ask([["sign_test", *count] for count in counts]), strict=True):
        assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert sign_test(0, 0) == 1.0


def test_the_sign_test_by_hand() -> None:
    assert sign_test(8, 0) == 2 / 256
    assert sign_test(3, 3) == 1 and sign_test(0, 0) == 1


def test_flips_are_a_share_of_the_verdicts_there_are() -> None:
    assert flip_rate([True, False, False, True]) == 0.5
    assert math.isnan(flip_rate([]))


def test_805_prompts_see_4_points_and_2_points_need_about_3300() -> None:
    spread = spread_of(0.3)
    assert detectable_difference(805, spread) == pytest.approx(0.04, abs=0.002)
    assert num_needed(0.02, spread) == pytest.approx(3300, rel=0.05)


@given(st.integers(1, 10_000), st.floats(0.01, 1))
def test_the_number_needed_for_what_a_number_detects_is_that_number(num: int, spread: float) -> None:
    assert num_needed(detectable_difference(num, spread) * (1 + 1e-9), spread) == num


@pytest.mark.parametrize("size", [200, 805])
def test_the_detectable_difference_is_seen_in_80_of_100_simulations(size: int) -> None:
    difference = detectable_difference(size, spread_of(0.3))
    chances = [0.35 + difference, 0.3, 0.35 - difference]
    draws = np.random.default_rng(1).choice([1, 0.5, 0], p=chances, size=(NUM_SIMULATIONS, size))
    errors = draws.std(axis=1, ddof=1) / math.sqrt(size)
    assert np.mean(draws.mean(axis=1) - 1.96 * errors > 0.5) == pytest.approx(0.8, abs=0.04)

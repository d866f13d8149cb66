"""The length penalty of rules without known steps: hand-worked, against brute force, and properties."""

import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dice_core.preferences.length_penalty import choose_length_penalty
from dice_core.preferences.selection import group_scores, select_pairs
from dice_core.preferences.settings import PairingConfig
from tests.score_tables import random_prompts, score_table
from tests.upstream_pairing import Response, sweep

MU_2SIGMA = PairingConfig(selection="mu-2sigma")
HALF = PairingConfig(selection="margin", margin_share=0.5)

# Margins |6 - 64 a| and |6 - 20 a|: the first is the larger below 0 and above 1/7, the second between. The gap of the
# one prompt that is kept: 64, 20, -64.
TWO_MARGINS = [[(10.0, 100), (4.0, 36)], [(8.0, 50), (2.0, 30)]]

responses = st.lists(
    st.tuples(st.integers(-40, 40).map(lambda n: n / 8) | st.floats(-50, 50), st.integers(1, 300)),
    min_size=2,
    max_size=6,
)
prompt_sets = st.lists(responses, min_size=2, max_size=6)


def plain_gap(prompts: list[list[Response]], alpha: float, config: PairingConfig) -> float:
    """Return the mean gap by the definitions, in plain Python."""
    found = []
    for members in prompts:
        values = [reward - alpha * length for reward, length in members]
        mark = statistics.fmean(values) - 2 * statistics.pstdev(values)
        best = values.index(max(values))
        distances = [abs(value - mark) for value in values]
        low = values.index(min(values)) if config.selection == "margin" else distances.index(min(distances))
        found.append((values[best] - values[low], members[best][1] - members[low][1]))
    if config.selection == "margin":
        order = sorted(range(len(found)), key=lambda index: -found[index][0])
        found = [found[index] for index in order[: max(1, round(config.margin_share * len(found)))]]
    return statistics.fmean(gap for _, gap in found)


def test_penalty_lies_where_the_gap_of_the_kept_prompts_is_smallest():
    penalty = choose_length_penalty(score_table(TWO_MARGINS), HALF)
    assert 0 < penalty.value < 1 / 7
    assert (penalty.gap, penalty.unpenalised_gap) == (20.0, 64.0)


def test_penalty_is_negative_where_chosen_responses_are_the_shorter_ones():
    prompts = [[(-reward, length) for reward, length in members] for members in TWO_MARGINS]
    penalty = choose_length_penalty(score_table(prompts), HALF)
    assert -1 / 7 < penalty.value < 0
    assert (penalty.gap, penalty.unpenalised_gap) == (-20.0, -64.0)


@pytest.mark.parametrize("config", [MU_2SIGMA, HALF])
def test_equal_lengths_need_no_penalty(config):
    penalty = choose_length_penalty(score_table([[(1.0, 10), (2.0, 10)]] * 2), config)
    assert (penalty.value, penalty.gap) == (0.0, 0.0)


@pytest.mark.parametrize("config", [MU_2SIGMA, HALF])
def test_no_prompt_is_given_up_to_a_tie(config):
    """At the corner 0.5 both prompts tie and the gap would be 0, of no pair at all."""
    table = score_table([[(5.0, 20), (0.0, 10)]] * 2)
    penalty = choose_length_penalty(table, config)
    assert abs(penalty.gap) == 10.0
    assert select_pairs(table, penalty.value, config).counts["num_tied_prompts"] == 0


def test_with_two_responses_a_prompt_both_rules_and_best_worst_agree():
    """The lower of two is the nearest to the mark: the steps of best-worst are those of mu-2sigma."""
    prompts = random_prompts(60, 2, seed=4)
    exact = choose_length_penalty(score_table(prompts), PairingConfig())
    assert choose_length_penalty(score_table(prompts), MU_2SIGMA).gap == exact.gap


@pytest.mark.parametrize("config", [MU_2SIGMA, PairingConfig(selection="margin")])
def test_many_prompts_are_balanced_to_less_than_one_prompts_share(config):
    table = score_table(random_prompts(400, 16, seed=6))
    penalty = choose_length_penalty(table, config)
    assert penalty.unpenalised_gap > 100
    assert abs(penalty.gap) < 20  # one of 100 prompts that turns moves it by a few hundredths of 1,000 characters


def test_of_mu_2sigma_it_is_the_crossing_nearest_to_zero():
    prompts = random_prompts(30, 12, seed=9)
    penalty = choose_length_penalty(score_table(prompts), MU_2SIGMA)
    nearer = np.linspace(0, 0.99 * penalty.value, 300)
    assert all(plain_gap(prompts, alpha, MU_2SIGMA) > 0 for alpha in nearer)


@given(prompt_sets)
@settings(deadline=None)
def test_no_penalty_makes_the_kept_pairs_more_alike_in_length(prompts):
    """The gap of rule margin never increases, so brute force over a fine grid can find no smaller one."""
    grouped = group_scores(score_table(prompts), HALF)
    penalty = choose_length_penalty(grouped, HALF)
    around = np.concatenate([np.linspace(-2, 2, 81), penalty.value * np.linspace(0, 2, 41)])
    for alpha in around:
        gap, num_tied = grouped.measure(float(alpha))
        if num_tied <= grouped.num_tied(penalty.value):
            assert abs(penalty.gap) <= abs(gap) + 1e-9


@given(prompt_sets, st.lists(st.floats(-30, 30), min_size=2, max_size=8))
def test_gap_of_the_prompts_with_the_largest_margins_never_increases(prompts, penalties):
    grouped = group_scores(score_table(prompts), HALF)
    gaps = [grouped.mean_length_gap(alpha) for alpha in sorted(penalties)]
    assert all(left >= right for left, right in pairwise(gaps))


@given(prompt_sets)
@settings(deadline=None)
def test_mu_2sigma_never_leaves_a_larger_gap_than_no_penalty_and_mends_it_from_the_right_side(prompts):
    grouped = group_scores(score_table(prompts), MU_2SIGMA)
    penalty = choose_length_penalty(grouped, MU_2SIGMA)
    if grouped.num_tied(0.0) <= grouped.num_tied(penalty.value):
        assert abs(penalty.gap) <= abs(penalty.unpenalised_gap)
    assert penalty.value * penalty.unpenalised_gap >= 0


@given(prompt_sets, st.sampled_from([MU_2SIGMA, HALF]), st.floats(-2, 2))
def test_gap_is_that_of_plain_python(prompts, config, alpha):
    measured = group_scores(score_table(prompts), config).mean_length_gap(alpha)
    # Where two responses or two prompts are within rounding of each other, either may be taken.
    near = [plain_gap(prompts, alpha + shift, config) for shift in (-1e-9, 0.0, 1e-9)]
    if near[0] == near[1] == near[2]:
        assert measured == pytest.approx(near[1])


@given(prompt_sets, st.sampled_from([MU_2SIGMA, HALF]))
@settings(max_examples=50, deadline=None)
def test_grid_is_what_upstreams_sweep_picks(prompts, config):
    grouped = group_scores(score_table(prompts), config)
    expected, _ = sweep(grouped.mean_length_gap)
    grid = config.model_copy(update={"length_penalty": "grid"})
    assert choose_length_penalty(grouped, grid).value == expected


@pytest.mark.parametrize("config", [MU_2SIGMA, HALF])
def test_curve_shows_zero_the_value_and_the_gaps_of_the_rule(config):
    prompts = random_prompts(100, 8, seed=1)
    penalty = choose_length_penalty(score_table(prompts), config)
    penalties, gaps = penalty.curve
    assert 18 <= len(penalties) <= 20
    assert gaps[penalties == 0.0].tolist() == [penalty.unpenalised_gap]
    assert gaps[penalties == penalty.value].tolist() == [penalty.gap]
    assert gaps.tolist() == pytest.approx([plain_gap(prompts, alpha, config) for alpha in penalties.tolist()])

"""The choice of the length penalty: hand-worked steps, upstream's sweep as an oracle, and properties of both modes."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dice_core.preferences.length_penalty import GRID, choose_length_penalty, gap_steps
from dice_core.preferences.selection import group_scores, select_pairs
from dice_core.preferences.settings import PairingConfig
from tests.score_tables import prompt_name, random_prompts, score_table
from tests.upstream_pairing import PandasPairing, plain_mean_gap, sweep

EXACT = PairingConfig()
UPSTREAM_GRID = PairingConfig(length_penalty="grid")

# Prompt 0 prefers its long response below (10 - 4) / (100 - 36) = 0.09375, prompt 1 below (8 - 2) / (50 - 30) = 0.3:
# the gap is (64 + 20) / 2 = 42, then (-64 + 20) / 2 = -22, then (-64 - 20) / 2 = -42.
TWO_STEPS = [[(10.0, 100), (4.0, 36)], [(8.0, 50), (2.0, 30)]]

responses = st.lists(
    st.tuples(st.integers(-40, 40).map(lambda n: n / 8) | st.floats(-50, 50), st.integers(1, 300)),
    min_size=2,
    max_size=6,
)
prompt_sets = st.lists(responses, min_size=2, max_size=6)


def test_steps_are_where_the_lines_cross():
    steps = gap_steps(group_scores(score_table(TWO_STEPS), EXACT))
    # Twice each: the chosen and the rejected response of a prompt of two change places at one corner.
    assert steps.corners.tolist() == [0.09375, 0.09375, 0.3, 0.3]
    assert steps.gaps[[0, 2, 4]].tolist() == [84.0, -44.0, -84.0]


def test_exact_is_the_middle_of_the_interval_with_the_smallest_gap():
    """The middle of 0.09375 and 0.3 is 0.196875, with a gap of -22."""
    penalty = choose_length_penalty(score_table(TWO_STEPS), EXACT)
    assert penalty.value == pytest.approx(0.196875)
    assert (penalty.gap, penalty.unpenalised_gap) == (-22.0, 42.0)


def test_grid_is_the_first_grid_point_with_the_smallest_gap():
    penalty = choose_length_penalty(score_table(TWO_STEPS), UPSTREAM_GRID)
    assert penalty.value == GRID[94]
    assert penalty.gap == -22.0


def test_number_is_used_as_it_is():
    config = PairingConfig(length_penalty=0.5)
    penalty = choose_length_penalty(score_table(TWO_STEPS), config)
    assert (penalty.value, penalty.gap) == (0.5, -42.0)


def test_exact_goes_below_zero_where_short_responses_are_preferred():
    """Rewards negated: every crossing changes its sign, and the grid can only stay at 0."""
    prompts = [[(-reward, length) for reward, length in responses] for responses in TWO_STEPS]
    assert choose_length_penalty(score_table(prompts), EXACT).value == pytest.approx(-0.196875)
    assert choose_length_penalty(score_table(prompts), UPSTREAM_GRID).value == 0.0


def test_exact_goes_above_one():
    prompts = [[(100 * reward, length) for reward, length in responses] for responses in TWO_STEPS]
    assert choose_length_penalty(score_table(prompts), EXACT).value == pytest.approx(19.6875)
    assert choose_length_penalty(score_table(prompts), UPSTREAM_GRID).value == 0.0


def test_exact_finds_a_balance_between_grid_points():
    """Prompt 0 turns at 0.0010625, prompt 1 at 0.0019; between them the gaps of +64 and -64 cancel."""
    prompts = [[(10.068, 100), (10.0, 36)], [(5.1216, 94), (5.0, 30)]]
    exact, grid = (choose_length_penalty(score_table(prompts), config) for config in (EXACT, UPSTREAM_GRID))
    assert exact.value == pytest.approx((0.0010625 + 0.0019) / 2)
    assert exact.gap == 0.0
    assert (grid.value, grid.gap) == (0.0, 64.0)


def test_zero_is_reported_where_it_is_as_good_as_any():
    prompts = [[(1.0, 10), (0.0, 50)], [(0.0, 10), (1.0, 50)]]
    penalty = choose_length_penalty(score_table(prompts), EXACT)
    assert (penalty.value, penalty.gap) == (0.0, 0.0)


def test_equal_lengths_need_no_penalty():
    penalty = choose_length_penalty(score_table([[(1.0, 10), (2.0, 10)]] * 2), EXACT)
    assert (penalty.value, penalty.gap) == (0.0, 0.0)


def test_exact_gives_up_no_prompt_to_a_tie():
    """At the corner 0.5 both prompts tie and the gap would be 0, of no pair at all."""
    prompts = [[(5.0, 20), (0.0, 10)]] * 2
    penalty = choose_length_penalty(score_table(prompts), EXACT)
    assert abs(penalty.gap) == 10.0
    assert select_pairs(score_table(prompts), penalty.value, EXACT).counts["num_tied_prompts"] == 0


def test_curve_shows_zero_the_value_and_a_falling_gap():
    penalty = choose_length_penalty(score_table(random_prompts(100, 8, seed=1)), PairingConfig())
    penalties, gaps = penalty.curve
    assert 48 <= len(penalties) <= 50
    assert gaps[penalties == 0.0].tolist() == [penalty.unpenalised_gap]
    assert gaps[penalties == penalty.value].tolist() == [penalty.gap]
    assert (np.diff(penalties) > 0).all()
    assert (np.diff(gaps) <= 0).all()


@given(prompt_sets, st.lists(st.floats(-30, 30), min_size=2, max_size=2))
def test_gap_never_increases(prompts, penalties):
    grouped = group_scores(score_table(prompts), EXACT)
    assert grouped.mean_length_gap(min(penalties)) >= grouped.mean_length_gap(max(penalties))


@given(prompt_sets)
def test_steps_say_what_selection_does_between_corners(prompts):
    grouped = group_scores(score_table(prompts), EXACT)
    steps = gap_steps(grouped)
    edges = np.concatenate([[-1e5], steps.corners, [1e5]])
    middles = ((edges[:-1] + edges[1:]) / 2)[np.diff(edges) > 1e-9]
    expected = [plain_mean_gap(prompts, middle) * len(prompts) for middle in middles]
    np.testing.assert_allclose(steps.at(middles), expected)


@given(prompt_sets)
@settings(max_examples=50, deadline=None)
def test_grid_is_what_upstreams_sweep_picks(prompts):
    expected, _ = sweep(lambda alpha: plain_mean_gap(prompts, alpha))
    assert choose_length_penalty(score_table(prompts), UPSTREAM_GRID).value == expected


@given(prompt_sets)
def test_exact_is_never_worse_than_grid_or_no_penalty(prompts):
    grouped = group_scores(score_table(prompts), EXACT)
    exact = choose_length_penalty(grouped, EXACT)
    for value in (0.0, choose_length_penalty(grouped, UPSTREAM_GRID).value):
        if grouped.num_tied(value) <= grouped.num_tied(exact.value):
            assert abs(exact.gap) <= abs(grouped.mean_length_gap(value))


def test_grid_pairs_are_upstreams_pairs_text_for_text():
    """80 prompts, 16 response files, one response in five dropped, some prompts left with fewer than eight."""
    rng = np.random.default_rng(7)
    prompts = random_prompts(80, 16, seed=8)
    keep = rng.random((80, 16)) > np.where(np.arange(80) % 10 == 0, 0.6, 0.2)[:, None]
    frames = [
        pd.DataFrame(
            {
                "prompt": [prompt_name(p) for p in range(80) if keep[p, k]],
                "response": [f"{k:02d}".ljust(prompts[p][k][1], "x") for p in range(80) if keep[p, k]],
                "score": [prompts[p][k][0] for p in range(80) if keep[p, k]],
            }
        )
        for k in range(16)
    ]
    upstream = PandasPairing(frames)
    alpha, tried = sweep(upstream.mean_gap)
    config = PairingConfig(length_penalty="grid")
    # Scoring leaves nothing of a prompt with fewer than eight.
    keep &= keep.sum(axis=1, keepdims=True) >= 8
    kept = score_table(
        [[response if keep[p, k] else (math.nan, 1) for k, response in enumerate(prompts[p])] for p in range(80)]
    )
    penalty = choose_length_penalty(kept, config)
    assert (penalty.value, abs(penalty.gap)) == (alpha, min(tried))
    selection = select_pairs(kept, penalty.value, config)
    pairs = upstream.pairs(alpha).sort_values("prompt")
    assert 70 < len(pairs) < 80
    assert selection.prompt_id.to_pylist() == pairs["prompt"].tolist()
    assert [f"{k:02d}" for k in selection.chosen_index] == [text[:2] for text in pairs["chosen"]]
    assert [f"{k:02d}" for k in selection.rejected_index] == [text[:2] for text in pairs["rejected"]]

"""The rules of selection: cases worked by hand, and plain Python as an oracle."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.preferences.pair_rules import best_and_two_deviations_below, best_and_worst, largest_margins
from dice_core.preferences.selection import select_pairs
from dice_core.preferences.settings import PairingConfig
from dice_core.settings.base import ConfigError
from tests.score_tables import prompt_name, score_table

MU_2SIGMA = PairingConfig(selection="mu-2sigma")

# Mean -10 / 25 = -0.4, variance 150 / 25 - 0.16 = 5.84, deviation 2.417: the mark is at -5.23.
ONE_OUTLIER = [5.0, -10.0, -5.0, *[0.0] * 22]

rewards = st.lists(st.integers(-40, 40).map(lambda n: n / 8) | st.floats(-50, 50), min_size=2, max_size=12)


def chosen_and_rejected(values: list[float]) -> tuple[int, int]:
    chosen, rejected = best_and_two_deviations_below(np.array([values]), np.array([len(values)]))
    return int(chosen[0]), int(rejected[0])


def test_rejected_is_nearest_to_two_deviations_below_the_mean_and_not_the_outlier():
    assert chosen_and_rejected(ONE_OUTLIER) == (0, 2)
    chosen, rejected = best_and_worst(np.array([ONE_OUTLIER]))
    assert (chosen[0], rejected[0]) == (0, 1)


def test_of_equally_near_responses_the_first_is_rejected():
    assert chosen_and_rejected([5.0, -10.0, 0.0, -5.0, -5.0, *[0.0] * 20]) == (0, 3)


def test_of_two_responses_the_lower_is_rejected():
    """Mean 2, deviation 1: the mark is at 0, and 1 is nearer to it than 3."""
    assert chosen_and_rejected([1.0, 3.0]) == (1, 0)


def test_a_single_outlier_far_below_equals_leaves_no_pair():
    """Mean -1/64, deviation 0.124: the mark is at -0.264, nearer to 0 than to -1."""
    chosen, rejected = chosen_and_rejected([*[0.0] * 63, -1.0])
    assert chosen == rejected == 0


def test_columns_beyond_a_prompts_size_count_for_nothing():
    """Short rows repeat their first response: with 30 more of 5.0 the mean, and so the mark, would be another."""
    padded = np.array([ONE_OUTLIER + [5.0] * 30, [1.0] * 27 + [-1.0] * 28])
    chosen, rejected = best_and_two_deviations_below(padded, np.array([25, 55]))
    assert (chosen.tolist(), rejected.tolist()) == ([0, 0], [2, 27])


@given(rewards)
def test_mark_is_that_of_plain_python(values):
    chosen, rejected = chosen_and_rejected(values)
    assert values[chosen] == max(values)
    mark = statistics.fmean(values) - 2 * statistics.pstdev(values)
    assert abs(values[rejected] - mark) <= min(abs(value - mark) for value in values) + 1e-9


@given(rewards, st.lists(rewards, max_size=3))
def test_a_prompts_pair_does_not_depend_on_the_others(values, others):
    sizes = np.array([len(row) for row in [values, *others]])
    padded = np.array([row + [row[0]] * (sizes.max() - len(row)) for row in [values, *others]])
    chosen, rejected = best_and_two_deviations_below(padded, sizes)
    assert (chosen[0], rejected[0]) == chosen_and_rejected(values)


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (1.0, [True, True, True, True, True]),
        (0.6, [True, False, True, True, False]),
        (0.4, [True, False, True, False, False]),
        (0.01, [True, False, False, False, False]),
    ],
)
def test_largest_margins_are_kept_and_of_equals_the_first(share, kept):
    assert largest_margins(np.array([3.0, 1.0, 2.0, 2.0, 1.0]), share).tolist() == kept


@given(rewards, st.floats(0.01, 1))
def test_no_prompt_left_out_has_a_larger_margin(margins, share):
    kept = largest_margins(np.array(margins), share)
    assert kept.sum() == max(1, round(share * len(margins)))
    assert max(np.array(margins)[~kept], default=-np.inf) <= min(np.array(margins)[kept])


def test_selection_takes_the_rule_of_the_settings():
    table = score_table([[(reward, 10) for reward in ONE_OUTLIER], [(1.0, 10), (2.0, 10)]])
    selection = select_pairs(table, 0.0, MU_2SIGMA)
    assert selection.chosen_index.tolist() == [0, 1]
    assert selection.rejected_index.tolist() == [2, 0]


def test_margins_are_those_after_the_penalty():
    """Margins 9 and 6; at a penalty of 0.1 per character 9 - 5 = 4 and 6. The prompt left out is counted."""
    table = score_table([[(9.0, 60), (0.0, 10)], [(6.0, 10), (0.0, 10)]])
    config = PairingConfig(selection="margin", margin_share=0.5)
    for penalty, kept in ((0.0, 0), (0.1, 1)):
        selection = select_pairs(table, penalty, config)
        assert selection.prompt_id.to_pylist() == [prompt_name(kept)]
        assert selection.counts["num_small_margin_prompts"] == 1
        assert selection.counts["num_tied_prompts"] == 0


def test_a_share_that_no_rule_reads_is_refused():
    with pytest.raises(ConfigError, match=r"pairing.*margin_share has no effect with selection 'best-worst'"):
        PairingConfig.parse({"margin_share": 0.5}, "pairing")

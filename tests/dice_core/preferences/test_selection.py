"""Grouping by prompt and selection of best and worst: hand-worked cases, and properties against plain Python."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dice_core.data.records import SCORES, RecordError
from dice_core.preferences.selection import PairError, group_scores, select_pairs
from dice_core.preferences.settings import PairingConfig
from tests.score_tables import prompt_name, random_prompts, score_table
from tests.upstream_pairing import plain_pair

CONFIG = PairingConfig()
TWO_PROMPTS = [[(10.0, 100), (4.0, 36), (7.0, 90)], [(2.0, 30), (8.0, 50), (5.0, 45)]]

responses = st.lists(
    st.tuples(st.integers(-40, 40).map(lambda n: n / 8) | st.floats(-50, 50), st.integers(1, 300)),
    min_size=2,
    max_size=9,
)
prompt_sets = st.lists(responses, min_size=2, max_size=8)


def shuffle(table: pa.Table, seed: int) -> pa.Table:
    return table.take(np.random.default_rng(seed).permutation(table.num_rows))


def indices(selection) -> list[tuple[str, int, int]]:
    columns = selection.prompt_id.to_pylist(), selection.chosen_index.tolist(), selection.rejected_index.tolist()
    return list(zip(*columns, strict=True))


def test_without_penalty_the_rewards_alone_decide():
    """Prompt 0: 10 is best, 4 worst. Prompt 1: 8 is best, 2 worst."""
    assert indices(select_pairs(score_table(TWO_PROMPTS), 0.0, CONFIG)) == [
        (prompt_name(0), 0, 1),
        (prompt_name(1), 1, 0),
    ]


def test_penalty_moves_the_choice_to_short_responses():
    """At 0.25: 10-25=-15, 4-9=-5, 7-22.5=-15.5 and 2-7.5=-5.5, 8-12.5=-4.5, 5-11.25=-6.25."""
    assert indices(select_pairs(score_table(TWO_PROMPTS), 0.25, CONFIG)) == [
        (prompt_name(0), 1, 2),
        (prompt_name(1), 1, 2),
    ]


def test_selection_carries_the_numbers_of_its_responses():
    table = score_table(TWO_PROMPTS)
    logps = np.arange(6) * -1.0
    table = table.set_column(2, SCORES.field("policy_logps"), pa.array(logps))
    table = table.set_column(3, SCORES.field("reference_logps"), pa.array(logps - [10, 4, 7, 2, 8, 5]))
    selection = select_pairs(table, 0.0, CONFIG)
    assert selection.chosen_reward.tolist() == [10.0, 8.0]
    assert selection.rejected_reward.tolist() == [4.0, 2.0]
    assert selection.chosen_policy_logps.tolist() == [0.0, -4.0]
    assert selection.rejected_policy_logps.tolist() == [-1.0, -3.0]
    assert selection.chosen_length.tolist() == [100, 50]
    assert selection.rejected_length.tolist() == [36, 30]


def test_token_lengths_are_used_when_asked():
    config = PairingConfig(length_unit="tokens")
    assert select_pairs(score_table(TWO_PROMPTS), 0.0, config).chosen_length.tolist() == [25, 13]


def test_ties_go_to_the_lowest_sample_index():
    table = shuffle(score_table([[(1.0, 10), (3.0, 20), (3.0, 30), (1.0, 40)], [(0.0, 1), (1.0, 1)]]), seed=3)
    assert indices(select_pairs(table, 0.0, CONFIG))[0] == (prompt_name(0), 1, 0)


def test_prompt_whose_responses_all_tie_is_dropped_and_counted():
    selection = select_pairs(score_table([[(1.0, 10)] * 3, *TWO_PROMPTS]), 0.0, CONFIG)
    assert selection.prompt_id.to_pylist() == [prompt_name(1), prompt_name(2)]
    assert selection.counts["num_tied_prompts"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_never_win_and_are_counted(bad):
    prompts = [[*responses, (bad, 5)] for responses in TWO_PROMPTS]
    selection = select_pairs(score_table(prompts), 0.0, CONFIG)
    assert indices(selection) == [(prompt_name(0), 0, 1), (prompt_name(1), 1, 0)]
    assert selection.counts["num_non_finite_scores"] == 2


def test_prompts_without_a_second_response_are_dropped_after_the_finite_check():
    """Prompt 2 has two responses, one of them without a finite score: the other has nothing to be compared with."""
    prompts = [*TWO_PROMPTS, [(1.0, 5), (np.nan, 7)]]
    grouped = group_scores(score_table(prompts), CONFIG)
    assert grouped.prompt_ids.to_pylist() == [prompt_name(0), prompt_name(1)]
    assert grouped.counts == {"num_scores": 8, "num_non_finite_scores": 1, "num_few_responses_prompts": 1}


def test_one_response_per_prompt_is_a_one_line_error_with_the_counts():
    table = score_table([[(1.0, 5)], [(2.0, 6)], [(3.0, 7)]])
    with pytest.raises(PairError) as error:
        group_scores(table, CONFIG)
    assert str(error.value) == (
        "pair: 0 of 3 prompts have at least 2 responses with a finite score, two prompts are needed; the most that one "
        "has is 1 (3 scores in all): generate more responses per prompt, or lower scoring.min_valid_responses"
    )


def test_one_good_prompt_is_not_enough():
    with pytest.raises(PairError, match=r"^pair: 1 of 2 prompts"):
        group_scores(score_table([TWO_PROMPTS[0], [(1.0, 5)]]), CONFIG)


def test_scores_without_any_finite_row_are_an_error_with_the_counts():
    with pytest.raises(PairError, match=r"0 of 2 prompts .* the most that one has is 0"):
        group_scores(score_table([[(np.nan, 5)] * 2] * 2), CONFIG)


@pytest.mark.parametrize("tables", [[], [SCORES.empty_table()]])
def test_no_scores_at_all_are_an_error(tables):
    with pytest.raises(PairError, match=r"^pair: (no score table|the score tables are empty)"):
        group_scores(tables, CONFIG)


def test_equal_models_are_named_as_the_likely_cause_of_all_ties():
    with pytest.raises(PairError, match="are the policy and the reference the same model"):
        select_pairs(score_table([[(0.0, 10), (0.0, 20)]] * 2), 0.0, CONFIG)


def test_table_given_twice_is_an_error_that_names_a_response():
    table = score_table(TWO_PROMPTS)
    with pytest.raises(
        PairError, match="6 responses were scored twice, the first is prompt_id prompt-0000 sample_index 0"
    ):
        group_scores([table, table], CONFIG)


def with_rewards(table: pa.Table, rewards: list[float | None]) -> pa.Table:
    return table.set_column(6, SCORES.field("reward"), pa.array(rewards, pa.float64()))


def test_rewards_of_the_table_rank_in_place_of_the_implicit_ones():
    """The implicit rewards prefer 0 and 1; the log-probs of the policy still go to training."""
    table = with_rewards(score_table(TWO_PROMPTS), [1.0, 2.0, 5.0, 4.5, 0.0, 3.0])
    selection = select_pairs(table, 0.0, CONFIG)
    assert indices(selection) == [(prompt_name(0), 2, 0), (prompt_name(1), 0, 1)]
    assert (selection.chosen_reward.tolist(), selection.rejected_reward.tolist()) == ([5.0, 4.5], [1.0, 0.0])
    assert selection.chosen_policy_logps.tolist() == [7.0, 2.0]
    assert not group_scores(table, CONFIG).is_implicit


def test_tables_of_before_have_implicit_rewards():
    table = score_table(TWO_PROMPTS).drop_columns(["reward"])
    assert group_scores(table, CONFIG).is_implicit
    assert indices(select_pairs(table, 0.0, CONFIG)) == indices(select_pairs(score_table(TWO_PROMPTS), 0.0, CONFIG))


def test_two_kinds_of_rewards_are_refused():
    table = score_table(TWO_PROMPTS)
    with pytest.raises(PairError, match=r"^pair: 6 of 12 scores have no value in column 'reward'"):
        group_scores([table, with_rewards(score_table([[(0.0, 1)] * 3] * 4).slice(6), [1.0] * 6)], CONFIG)


def test_outside_tables_are_checked_against_the_schema():
    with pytest.raises(RecordError, match="scores: column 'num_chars' is missing"):
        group_scores(score_table(TWO_PROMPTS).drop_columns(["num_chars"]), CONFIG)


@given(prompt_sets, st.floats(-2, 2))
def test_selection_equals_plain_python(prompts, length_penalty):
    expected = [
        (prompt_name(index), *pair)
        for index, responses in enumerate(prompts)
        if len(set(pair := plain_pair(responses, length_penalty))) == 2
    ]
    if not expected:
        return
    assert indices(select_pairs(score_table(prompts), length_penalty, CONFIG)) == expected


@given(prompt_sets, st.floats(-2, 2), st.integers(0, 99))
@settings(max_examples=50)
def test_row_order_and_cutting_into_tables_change_nothing(prompts, length_penalty, seed):
    table = score_table(prompts)
    try:
        expected = select_pairs(table, length_penalty, CONFIG)
    except PairError:
        return
    mixed = shuffle(table, seed)
    cut = [mixed.slice(start, 5) for start in range(0, mixed.num_rows, 5)]
    assert indices(select_pairs(mixed, length_penalty, CONFIG)) == indices(expected)
    assert indices(select_pairs(iter(cut), length_penalty, CONFIG)) == indices(expected)


def test_more_prompts_than_fit_one_matrix_and_uneven_groups_keep_their_places():
    prompts = random_prompts(6_000, 64, seed=5)
    prompts = [responses[: 2 + index % 60] for index, responses in enumerate(prompts)]
    expected = [(prompt_name(index), *plain_pair(responses, 0.02)) for index, responses in enumerate(prompts)]
    assert indices(select_pairs(score_table(prompts), 0.02, CONFIG)) == expected

"""Rows of prompt groups: what each token sees, worked by hand and against the definition; batches that lose nothing."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.logprobs.packing import (
    PromptGroup,
    PromptGroupError,
    Row,
    fill_rows,
    length_batches,
    pack_row,
    padded,
    row_length,
    split_groups,
    windowed,
)

GROUP = PromptGroup([10, 11], [[20, 21, 22], [30], [40, 41]])

lengths = st.lists(st.integers(0, 6), max_size=4)
shapes = st.lists(st.tuples(st.integers(1, 5), lengths), min_size=1, max_size=4)


def groups_of(shapes: Sequence[tuple[int, list[int]]]) -> list[PromptGroup]:
    """Return groups of the given lengths whose tokens are all different."""
    tokens = iter(range(1, 10_000))

    def take(count: int) -> list[int]:
        return [next(tokens) for _ in range(count)]

    return [PromptGroup(take(prompt), [take(length) for length in responses]) for prompt, responses in shapes]


def sees(row: Row) -> np.ndarray:
    """Return which place (column) each place (row) of a row sees."""
    places = np.arange(len(row.input_ids))
    own = (places >= row.own_starts[:, None]) & (places <= places[:, None])
    return own | ((places >= row.prompt_starts[:, None]) & (places < row.prompt_ends[:, None]))


def seen_tokens(row: Row, place: int) -> list[int]:
    return row.input_ids[sees(row)[place]].tolist()


def test_a_row_has_the_prompt_once_and_responses_without_their_last_tokens() -> None:
    row = pack_row([GROUP])
    assert row.input_ids.tolist() == [10, 11, 20, 21, 40]
    assert row.positions.tolist() == [0, 1, 2, 3, 2]
    assert row_length(GROUP) == 5


def test_a_token_sees_its_prompt_and_its_own_response_so_far() -> None:
    row = pack_row([GROUP])
    assert seen_tokens(row, 1) == [10, 11]
    assert seen_tokens(row, 3) == [10, 11, 20, 21]
    assert seen_tokens(row, 4) == [10, 11, 40]


def test_the_first_token_of_every_response_is_predicted_by_the_end_of_the_prompt() -> None:
    row = pack_row([GROUP])
    assert row.targets.tolist() == [20, 21, 22, 30, 40, 41]
    assert row.predictors.tolist() == [1, 2, 3, 1, 1, 4]


def test_groups_in_one_row_do_not_see_each_other() -> None:
    row = pack_row([GROUP, PromptGroup([50], [[60, 61]])])
    assert row.input_ids.tolist() == [10, 11, 20, 21, 40, 50, 60]
    assert seen_tokens(row, 5) == [50]
    assert seen_tokens(row, 6) == [50, 60]
    assert row.predictors.tolist()[-2:] == [5, 6]


def test_a_window_counts_positions_and_not_places_in_the_row() -> None:
    row = windowed(pack_row([GROUP]), 2)
    # Token 40 has position 2: it sees position 1 of the prompt, although 20 and 21 lie between.
    assert seen_tokens(row, 4) == [11, 40]
    assert seen_tokens(row, 3) == [20, 21]
    assert seen_tokens(row, 2) == [11, 20]


@given(shapes, st.integers(1, 6))
def test_a_window_hides_exactly_what_is_too_far(shapes: list[tuple[int, list[int]]], window: int) -> None:
    row = pack_row(groups_of(shapes))
    distance = row.positions[:, None] - row.positions
    assert (sees(windowed(row, window)) == (sees(row) & (distance < window))).all()


@given(shapes)
def test_every_response_token_is_predicted_from_what_came_before_it(shapes: list[tuple[int, list[int]]]) -> None:
    groups = groups_of(shapes)
    row = pack_row(groups)
    expected = [
        [*group.prompt_token_ids, *response[:index]]
        for group in groups
        for response in group.responses
        for index in range(len(response))
    ]
    assert [seen_tokens(row, place) for place in row.predictors] == expected
    assert row.targets.tolist() == [token for group in groups for response in group.responses for token in response]


def test_padding_sees_itself_and_nobody_sees_it() -> None:
    row = padded(pack_row([GROUP]), 8)
    visible = sees(row)
    assert visible.shape == (8, 8)
    assert visible[5:].tolist() == np.eye(8, dtype=bool)[5:].tolist()
    assert not visible[:5, 5:].any()


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(PromptGroupError, match="no tokens"):
        PromptGroup([], [[1]])


def test_a_long_group_is_cut_and_every_piece_has_the_prompt() -> None:
    pieces = split_groups([GROUP], max_tokens=4)
    assert [(piece.group, piece.indices, piece.num_tokens) for piece in pieces] == [(0, (0, 1), 4), (0, (2,), 3)]


@given(shapes, st.integers(1, 12))
def test_rows_hold_every_response_once_and_no_more_than_they_may(
    shapes: list[tuple[int, list[int]]], max_tokens: int
) -> None:
    groups = groups_of(shapes)
    rows = fill_rows(split_groups(groups, max_tokens), max_tokens)
    places = [(piece.group, index) for row in rows for piece in row for index in piece.indices]
    assert sorted(places) == [(g, i) for g, group in enumerate(groups) for i in range(len(group.responses))]
    for row in rows:
        is_one_response = len(row) == 1 and len(row[0].indices) == 1
        assert is_one_response or sum(piece.num_tokens for piece in row) <= max_tokens


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 100))
def test_batches_hold_every_sequence_once_longest_first(lengths: list[int], max_tokens: int) -> None:
    batches = length_batches(lengths, max_tokens)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= max_tokens for batch in batches)

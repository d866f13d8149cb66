"""In which order pairs are trained on, and which are kept."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.data.records import PAIRS, RecordError
from dice_core.training.batches import measured_pairs, packed_rows, read_pairs, step_order


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 10), st.integers(0, 3))
def test_pairs_are_used_equally_often_and_each_step_goes_from_long_to_short(
    num_pairs: int, batch: int, num_steps: int, seed: int
) -> None:
    lengths = [(7 * i) % 5 for i in range(num_pairs)]
    order = step_order(lengths, batch, num_steps, seed)
    counts = Counter(order)
    assert len(order) == batch * num_steps
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(num_pairs)) <= 1
    for start in range(0, len(order), batch):
        step = [lengths[i] for i in order[start : start + batch]]
        assert step == sorted(step, reverse=True)


def test_rows_of_a_step_are_nearly_equal_in_tokens_and_go_from_large_to_small() -> None:
    # Longest first, each to the emptiest row: 9 | 8 | 7, then 6 joins 7, 5 joins 8, 4 joins 9, and 1 the first of three
    # rows of 13. In the second step 50 stays alone; 3 | 3, 3 joins the first, 2 and 2 the second, 1 the first.
    lengths = [9, 8, 7, 6, 5, 4, 1, 50, 3, 3, 3, 2, 2, 1]
    rows = packed_rows(range(14), lengths, batch_size=7, num_rows=3)
    assert rows == [[0, 5, 6], [1, 4], [2, 3], [7], [8, 10, 13], [9, 11, 12]]


@given(st.lists(st.integers(1, 4000), min_size=32, max_size=32), st.sampled_from([1, 2, 8, 16, 32]))
def test_every_pair_of_a_step_is_in_one_row_and_no_row_is_empty(lengths: list[int], num_rows: int) -> None:
    order = sorted(range(32), key=lambda i: -lengths[i])
    rows = packed_rows(order, lengths, batch_size=32, num_rows=num_rows)
    assert sorted(i for row in rows for i in row) == list(range(32))
    assert len(rows) == num_rows and all(rows)
    sums = [sum(lengths[i] for i in row) for row in rows]
    # Whoever got the last pair had the fewest tokens before it.
    assert max(sums) - min(sums) <= max(lengths)


def test_the_order_depends_on_the_seed_alone_and_more_steps_only_add_to_it() -> None:
    lengths = list(range(10))
    assert step_order(lengths, 4, 5, 1) == step_order(lengths, 4, 5, 1)
    assert step_order(lengths, 4, 5, 1) != step_order(lengths, 4, 5, 2)
    assert step_order(lengths, 4, 9, 1)[:20] == step_order(lengths, 4, 5, 1)


def pairs_table(num_pairs: int, num_tokens: int) -> pa.Table:
    row: dict[str, Any] = {"prompt": "q", "chosen": "a", "rejected": "b", "source": "generated", "split": "train"}
    row |= {f"{part}_token_ids": [i] * num_tokens for i, part in enumerate(("prompt", "chosen", "rejected"))}
    return pa.Table.from_pylist([{**row, "prompt_id": f"prompt-{i}"} for i in range(num_pairs)], PAIRS)


@pytest.mark.parametrize(
    ("num_pairs", "num_trained", "num_measured"), [(10, 800, 10), (900, 64, 16), (900, 800, 100), (900, 9600, 256)]
)
def test_an_eighth_of_what_is_trained_on_is_measured_between_16_and_256_pairs(
    num_pairs: int, num_trained: int, num_measured: int
) -> None:
    pairs = read_pairs(pairs_table(num_pairs, 2), 16, "pairs")
    assert [pair.index for pair in measured_pairs(pairs.train, num_trained)] == list(range(num_measured))


def test_a_pair_of_one_response_is_dropped_and_counted() -> None:
    rows = pairs_table(3, 2).to_pylist()
    rows[1]["rejected_token_ids"] = rows[1]["chosen_token_ids"]
    pairs = read_pairs(pa.Table.from_pylist(rows, PAIRS), 16, "pairs")
    assert [pair.prompt_id for pair in pairs.train] == ["prompt-0", "prompt-2"]
    assert (pairs.num_identical, pairs.num_dropped, pairs.reference_logps.shape) == (1, 0, (2, 2))
    with pytest.raises(RecordError, match=r"of 1 pairs \(1 have two responses of the same token ids\)$"):
        read_pairs(pa.Table.from_pylist(rows[1:2], PAIRS), 16, "pairs")


def test_no_pair_left_says_what_was_dropped_and_nothing_of_that_where_there_was_none() -> None:
    with pytest.raises(RecordError) as caught:
        read_pairs(pairs_table(2, 5), 8, "p.parquet")
    assert str(caught.value) == (
        "p.parquet: no training pair is left of 2 pairs "
        "(training.max_length is 8, the shortest dropped pair has 10 tokens)"
    )
    with pytest.raises(RecordError) as caught:
        read_pairs(pairs_table(0, 5), 8, "p.parquet")
    assert str(caught.value) == "p.parquet: no training pair is left of 0 pairs"

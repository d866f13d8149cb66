"""In which order pairs are trained on, and which are kept."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.records import PAIRS, RecordError
from dice_core.training_data import measured_pairs, read_pairs, step_order


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


def test_the_order_depends_on_the_seed_alone_and_more_steps_only_add_to_it() -> None:
    lengths = list(range(10))
    assert step_order(lengths, 4, 5, 1) == step_order(lengths, 4, 5, 1)
    assert step_order(lengths, 4, 5, 1) != step_order(lengths, 4, 5, 2)
    assert step_order(lengths, 4, 9, 1)[:20] == step_order(lengths, 4, 5, 1)


def pairs_table(num_pairs: int, num_tokens: int) -> pa.Table:
    row: dict[str, Any] = {"prompt": "q", "chosen": "a", "rejected": "b", "source": "generated", "split": "train"}
    row |= {f"{part}_token_ids": [1] * num_tokens for part in ("prompt", "chosen", "rejected")}
    return pa.Table.from_pylist([{**row, "prompt_id": f"prompt-{i}"} for i in range(num_pairs)], PAIRS)


@pytest.mark.parametrize(
    ("num_pairs", "num_trained", "num_measured"), [(10, 800, 10), (900, 64, 16), (900, 800, 100), (900, 9600, 256)]
)
def test_an_eighth_of_what_is_trained_on_is_measured_between_16_and_256_pairs(
    num_pairs: int, num_trained: int, num_measured: int
) -> None:
    pairs = read_pairs(pairs_table(num_pairs, 2), 16, "pairs")
    assert [pair.index for pair in measured_pairs(pairs.train, num_trained)] == list(range(num_measured))


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

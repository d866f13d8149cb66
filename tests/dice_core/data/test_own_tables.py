"""A person's own tables of prompts and pairs are cleaned as prepare-data does it, and all of it is counted."""

import pyarrow as pa
import pytest

from dice_core.data.own_tables import clean_table
from dice_core.data.records import PREFERENCES, PROMPTS, RecordError


def pairs(*rows: tuple[str, str, str]) -> pa.Table:
    names = ("prompt", "chosen", "rejected")
    return pa.Table.from_pylist(
        [{"prompt_id": str(i), **dict(zip(names, row, strict=True))} for i, row in enumerate(rows)], PREFERENCES
    )


def test_templated_and_empty_rows_go_and_repeated_prompts_are_taken_off() -> None:
    table = pairs(
        ("What is 2 + 2?", "4", "5"),
        ("What is 2 + 2?", "What is 2 + 2? It is 4.", "5"),
        ("Hi", "Hello.<|im_end|>", "No."),
        ("<|im_start|>user\nHi", "Hello.", "No."),
        ("Who are you?", " ", "No."),
        ("Who are you?", "Who are you?", "No."),
    )
    kept, counts = clean_table(table, ["<|im_start|>", "<|im_end|>"], "d.parquet")
    assert [(row["prompt_id"], row["chosen"]) for row in kept.to_pylist()] == [("0", "4"), ("1", "It is 4.")]
    assert kept.schema == PREFERENCES
    assert counts == {
        "num_dropped_own_control_tokens": 2,
        "num_dropped_own_empty": 2,
        "num_cleaned_own_repeated_prompt": 1,
    }


def test_a_good_table_stays_as_it_is() -> None:
    table = pa.table({"prompt_id": ["a", "b"], "prompt": ["Say <b>hi</b>", "2 < 3 | 4 > 3?"]}, schema=PROMPTS)
    assert clean_table(table, ["<|im_end|>"], "p.parquet") == (table, {})
    assert clean_table(PROMPTS.empty_table(), [], "p.parquet") == (PROMPTS.empty_table(), {})


def test_a_prompt_twice_is_one_and_an_identity_of_two_prompts_is_refused() -> None:
    twice = pa.table({"prompt_id": ["a", "a"], "prompt": ["x", "x"]}, schema=PROMPTS)
    kept, counts = clean_table(twice, [], "p.parquet")
    assert (kept.num_rows, counts) == (1, {"num_dropped_own_duplicate": 1})
    two = pa.table({"prompt_id": ["a", "a"], "prompt": ["x", "y"]}, schema=PROMPTS)
    with pytest.raises(RecordError, match=r"^p\.parquet: prompt_id 'a' stands for two prompts: give each its own$"):
        clean_table(two, [], "p.parquet")


def test_a_table_of_which_nothing_is_left_says_where_it_went() -> None:
    table = pa.table({"prompt_id": ["a"], "prompt": ["<|im_start|>user"]}, schema=PROMPTS)
    with pytest.raises(RecordError, match=r"^p\.parquet: no row is left, dropped: 1 control_tokens$"):
        clean_table(table, ["<|im_start|>"], "p.parquet")

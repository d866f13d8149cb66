"""Tables: schemas hold, and a table that is not what it claims is refused by name."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dice_core.data import records


def test_a_table_comes_back_as_written_in_schema_order_without_other_columns(tmp_path):
    table = pa.table({"extra": [1], "prompt": ["Hi"], "prompt_id": ["a"]})
    records.write_table(table, records.PROMPTS, tmp_path / "prompts.parquet")
    assert records.read_table(tmp_path / "prompts.parquet", records.PROMPTS).to_pydict() == {
        "prompt_id": ["a"],
        "prompt": ["Hi"],
    }


def test_numbers_are_cast_where_nothing_is_lost():
    table = pa.table(
        {
            "prompt_id": ["a"],
            "sample_index": pa.array([3], pa.int64()),
            "policy_logps": pa.array([-1.5], pa.float32()),
            "reference_logps": [-2.0],
            "num_chars": [7],
            "num_tokens": [2],
        }
    )
    assert records.conform(table, records.SCORES, "t").schema == records.SCORES


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["Hi"]}, "column 'prompt_id' is missing, it has prompt"),
        ({"prompt_id": ["a"], "prompt": [None]}, "column 'prompt' has 1 empty values"),
        ({"prompt_id": ["a"], "prompt": [[1]]}, "column 'prompt' must be string"),
    ],
)
def test_a_table_of_another_schema_is_refused(columns, message):
    with pytest.raises(records.RecordError, match=message):
        records.conform(pa.table(columns), records.PROMPTS, "t")


def test_a_cut_file_is_refused_by_name(tmp_path):
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt_id": ["a"], "prompt": ["Hi"]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(records.RecordError, match=r"prompts.parquet: not a readable Parquet file"):
        records.read_table(path, records.PROMPTS)


def test_a_prompt_id_is_pinned():
    assert records.prompt_id("Hello") == "185f8db32271fe25f561a6fc938b2e26"


def large_column() -> pa.ChunkedArray:
    """Return 2,112 texts of 1 MiB, more than one Arrow array of `string` holds; one chunk many times takes 64 MiB."""
    chunk = pa.array([f"{number:02d}" + "x" * (2**20 - 2) for number in range(64)])
    return pa.chunked_array([chunk] * 33)


def test_rows_are_taken_from_a_column_of_more_than_two_gibibytes():
    rows = np.array([2111, 0, 65, 64, 2111])
    taken = records.take_text(large_column(), rows)
    assert [text[:2] for text in taken.to_pylist()] == ["63", "00", "01", "00", "63"]


def test_rows_come_in_the_order_asked_for_whatever_the_chunks():
    texts = [f"text {number}" for number in range(50)]
    chunked = pa.chunked_array([texts[:3], [], texts[3:30], texts[30:]], pa.large_string())
    rows = np.random.default_rng(0).integers(0, 50, 40)
    taken = records.take_text(chunked, rows, rows_at_a_time=7)
    assert taken.type == pa.string()
    assert taken.to_pylist() == [texts[row] for row in rows]
    assert len(records.take_text(chunked, rows[:0])) == 0


def test_tables_made_one_after_another_are_one_file(tmp_path):
    tables = (pa.table({"prompt_id": [f"{n}"], "prompt": [f"Hi {n}"]}) for n in range(3))
    records.write_tables(tables, records.PROMPTS, tmp_path / "p.parquet")
    assert records.read_table(tmp_path / "p.parquet", records.PROMPTS)["prompt"].to_pylist() == ["Hi 0", "Hi 1", "Hi 2"]
    assert pq.ParquetFile(tmp_path / "p.parquet").num_row_groups == 3


def test_an_empty_value_inside_a_list_is_refused():
    columns = {"prompt_id": ["a", "b"], "sample_index": [0, 1], "prompt_token_ids": [[1], [2]]}
    columns |= {"response_token_ids": [[5], [None, 6]], "response": ["x", "y"], "finish_reason": ["stop", "stop"]}
    with pytest.raises(records.RecordError, match=r"^t: column 'response_token_ids' has 1 empty values in its lists"):
        records.conform(pa.table(columns), records.RESPONSES, "t")
    columns["response_token_ids"] = [[5], []]
    assert records.conform(pa.table(columns), records.RESPONSES, "t").schema == records.RESPONSES

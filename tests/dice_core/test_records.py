"""Tables: schemas hold, and a table that is not what it claims is refused by name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dice_core import records


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

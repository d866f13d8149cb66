"""Rows go to a file in any order and come back by number."""

import numpy as np
import pyarrow as pa

from dice_core.preferences.spill import Spill

SCHEMA = pa.schema([pa.field("text", pa.string(), False), pa.field("ids", pa.list_(pa.int32()), False)])


def rows(numbers):
    return pa.table({"text": [f"row {n}" for n in numbers], "ids": [[int(n)] * (n % 4) for n in numbers]}, SCHEMA)


def test_rows_added_in_any_order_are_taken_by_number(tmp_path):
    numbers = np.random.default_rng(0).permutation(100)
    kept = Spill(tmp_path / "rows.arrow", SCHEMA, 100, bucket_rows=16, buffer_bytes=500)
    for part in np.array_split(numbers, 13):
        kept.add(part, rows(part))
    kept.finish()
    assert kept.times_added.tolist() == [1] * 100
    for wanted in (np.arange(100), np.array([3, 15, 16, 17, 80, 99]), np.arange(0)):
        assert kept.take(wanted).equals(rows(wanted))


def test_what_is_missing_and_what_came_twice_is_known(tmp_path):
    kept = Spill(tmp_path / "rows.arrow", SCHEMA, 4)
    kept.add(np.array([0, 2]), rows([0, 2]))
    kept.add(np.array([2, 3]), rows([2, 3]))
    kept.finish()
    assert kept.times_added.tolist() == [1, 0, 2, 1]


def test_nothing_added_is_nothing_taken(tmp_path):
    kept = Spill(tmp_path / "rows.arrow", SCHEMA, 0)
    kept.finish()
    assert kept.take(np.arange(0)).equals(SCHEMA.empty_table())


def test_parts_without_a_row_are_as_if_not_added(tmp_path):
    kept = Spill(tmp_path / "rows.arrow", SCHEMA, 2)
    kept.add(np.arange(0), rows([]))
    kept.finish()
    assert kept.times_added.tolist() == [0, 0]

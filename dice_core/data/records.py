"""The tables that stages hand to each other: Arrow schemas, and checks that a table is what it claims to be.

Reads and writes Parquet files on this machine; `storage` keeps them.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

# Rows of text that surely fit into one Arrow array of `string`, which holds 2 GiB.
ROWS_AT_A_TIME = 4096

_IDS = pa.list_(pa.int32())

PROMPTS = pa.schema([pa.field("prompt_id", pa.string(), False), pa.field("prompt", pa.string(), False)])

PREFERENCES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        pa.field("prompt", pa.string(), False),
        pa.field("chosen", pa.string(), False),
        pa.field("rejected", pa.string(), False),
    ]
)

RESPONSES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        pa.field("sample_index", pa.int32(), False),
        pa.field("prompt_token_ids", _IDS, False),
        # The end-of-turn token is the last id where finish_reason is "stop".
        pa.field("response_token_ids", _IDS, False),
        # Decoded without special tokens, stripped.
        pa.field("response", pa.string(), False),
        pa.field("finish_reason", pa.string(), False),  # stop | length
    ]
)

SCORES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        pa.field("sample_index", pa.int32(), False),
        # Nats, summed over the response tokens with the end-of-turn token.
        pa.field("policy_logps", pa.float64(), False),
        pa.field("reference_logps", pa.float64(), False),
        pa.field("num_chars", pa.int32(), False),
        pa.field("num_tokens", pa.int32(), False),
        # What ranks the responses, in units of its own (a reward model's raw score, a judge's grade); null in all rows:
        # the implicit reward, policy_logps - reference_logps. Tables of format 1 lack the column, and mean that.
        pa.field("reward", pa.float64()),
    ]
)

PAIRS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        pa.field("prompt", pa.string(), False),
        pa.field("chosen", pa.string(), False),
        pa.field("rejected", pa.string(), False),
        pa.field("prompt_token_ids", _IDS, False),
        pa.field("chosen_token_ids", _IDS, False),
        pa.field("rejected_token_ids", _IDS, False),
        # What the pair was chosen by, without length penalty; null for replayed pairs. The implicit reward is without
        # beta, in nats.
        pa.field("chosen_reward", pa.float64()),
        pa.field("rejected_reward", pa.float64()),
        # Log-probs under the reference of training (the policy that starts it), nats; null where unknown.
        pa.field("chosen_reference_logps", pa.float64()),
        pa.field("rejected_reference_logps", pa.float64()),
        pa.field("source", pa.string(), False),  # generated | replayed
        pa.field("split", pa.string(), False),  # train | eval
    ]
)


class RecordError(ValueError):
    """A table without the columns or types it should have. The message is one line."""


def prompt_id(prompt: str) -> str:
    """Return the identity of a prompt: 128 bits of the SHA-256 of its text, in hex."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def conform(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return the table with exactly the schema's columns, in its order and types.

    Columns the schema does not name are dropped, one that may be null and is missing is filled with nulls; numbers are
    cast where no value is lost.

    Raises:
        RecordError: another column is missing, cannot be cast, or has nulls where the schema has none, in its lists
            neither.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            if field.nullable:
                columns.append(pa.nulls(table.num_rows, field.type))
                continue
            raise RecordError(f"{where}: column {field.name!r} is missing, it has {', '.join(table.column_names)}")
        try:
            column = table[field.name].cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RecordError(f"{where}: column {field.name!r} must be {field.type}: {error}") from None
        if not field.nullable and column.null_count:
            raise RecordError(f"{where}: column {field.name!r} has {column.null_count} empty values, none is allowed")
        if pa.types.is_list(field.type) and (num_empty := pc.list_flatten(column).null_count):
            raise RecordError(
                f"{where}: column {field.name!r} has {num_empty} empty values in its lists: give ids only"
            )
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def take_text(
    column: pa.ChunkedArray, rows: NDArray[np.int64], rows_at_a_time: int = ROWS_AT_A_TIME
) -> pa.ChunkedArray:
    """Return rows of a text column of any size, in pieces of `string`.

    Arrow's own `take` and `sort_by` join all chunks first, and fail where these hold more than 2 GiB.

    Args:
        column: of `string` or `large_string`.
        rows: positions in it, in any order.
        rows_at_a_time: of one piece.
    """
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    pieces = []
    for start in range(0, len(rows), rows_at_a_time):
        wanted = rows[start : start + rows_at_a_time]
        owners = np.searchsorted(ends, wanted, side="right")
        order = np.argsort(owners, kind="stable")
        taken = []
        for members in np.split(order, np.flatnonzero(np.diff(owners[order])) + 1):
            chunk = column.chunk(int(owners[members[0]]))
            taken.append(chunk.take(pa.array(wanted[members] - (ends[owners[members[0]]] - len(chunk)))))
        pieces.append(pa.concat_arrays(taken).take(pa.array(np.argsort(order))).cast(pa.string()))
    return pa.chunked_array(pieces, pa.string())


def write_table(table: pa.Table, schema: pa.Schema, path: Path) -> None:
    """Write a table as zstd Parquet, after checking that it has the schema."""
    pq.write_table(conform(table, schema, str(path)), path, compression="zstd")


def write_tables(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Write tables that are made one after another as one zstd Parquet file; none is held longer than it takes."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(conform(table, schema, str(path)))


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None, where: str = "") -> pa.Table:
    """Read a Parquet file and check it against the schema.

    Args:
        path: the file.
        schema: what it must hold.
        columns: only these, all by default.
        where: what a message calls it; the path by default.

    Raises:
        RecordError: not Parquet, or not of this schema.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    try:
        present = set(pq.read_schema(path).names)
        table = pq.read_table(path, columns=[name for name in wanted.names if name in present])
    except pa.ArrowInvalid as error:
        raise RecordError(f"{where or path}: not a readable Parquet file: {error}") from None
    return conform(table, wanted, where or str(path))

"""Rows that come in any order, kept in a file until all are there, and given back by their numbers.

For tables larger than memory: what is held is a buffer, and the rows that are asked for.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Rows of neighbouring numbers lie together in the file: that many are brought into memory at a time. At 16,384 rows an
# Arrow array of text (2 GiB at most) has room for 128 KiB a row.
BUCKET_ROWS = 16_384
_BUFFER_BYTES = 64 * 2**20
_NUMBER = "number"


class Spill:
    """A file of numbered rows: add all of them, finish, then take."""

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        num_rows: int,
        bucket_rows: int = BUCKET_ROWS,
        buffer_bytes: int = _BUFFER_BYTES,
    ) -> None:
        """Make the file.

        Args:
            path: of the file, which is the caller's to delete.
            schema: of the rows.
            num_rows: the numbers are 0 .. num_rows - 1.
            bucket_rows: rows of neighbouring numbers that are brought into memory at a time.
            buffer_bytes: rows held before they are written.
        """
        self.times_added = np.zeros(num_rows, dtype=np.int32)
        """[num_rows] how often each number was added; only what was added once can be taken."""
        self._path, self._bucket_rows, self._buffer_bytes = path, bucket_rows, buffer_bytes
        self._schema = pa.schema([pa.field(_NUMBER, pa.int64(), False), *schema])
        self._buffer: list[pa.Table] = []
        self._held_bytes = 0
        self._batches: dict[int, list[int]] = {}
        self._num_batches = 0
        # Half the disk, at less time than writing the other half takes.
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = pa.ipc.new_file(str(path), self._schema, options=options)

    def add(self, numbers: Ints, rows: pa.Table) -> None:
        """Add rows [n] of the schema under their numbers [n]; of n = 0 there is nothing to write."""
        if not len(numbers):
            return
        np.add.at(self.times_added, numbers, 1)
        columns = [pa.array(numbers), *(rows[name] for name in self._schema.names[1:])]
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._buffer.append(table)
        self._held_bytes += table.nbytes
        if self._held_bytes > self._buffer_bytes:
            self._flush()

    def finish(self) -> None:
        """Write what is still in memory; nothing can be added any more."""
        self._flush()
        self._writer.close()

    def take(self, numbers: Ints) -> pa.Table:
        """Return the rows of these ascending numbers, in their order; those of a bucket or two at a time."""
        buckets = numbers // self._bucket_rows
        parts = [self._schema.empty_table()]
        with pa.memory_map(str(self._path)) as file:
            reader = pa.ipc.open_file(file)
            for bucket in np.unique(buckets):
                batches = [reader.get_batch(number) for number in self._batches[int(bucket)]]
                table = pa.Table.from_batches(batches, self._schema).combine_chunks()
                first, row_of = bucket * self._bucket_rows, np.empty(self._bucket_rows, dtype=np.int64)
                row_of[table[_NUMBER].to_numpy() - first] = np.arange(table.num_rows)
                parts.append(table.take(pa.array(row_of[numbers[buckets == bucket] - first])))
        return pa.concat_tables(parts).drop_columns(_NUMBER)

    def _flush(self) -> None:
        """Write the buffer, each bucket's rows as one batch."""
        if not self._buffer:
            return
        table = pa.concat_tables(self._buffer).combine_chunks()
        self._buffer, self._held_bytes = [], 0
        buckets = table[_NUMBER].to_numpy() // self._bucket_rows
        order = np.argsort(buckets, kind="stable")
        table, buckets = table.take(pa.array(order)), buckets[order]
        starts = np.flatnonzero(np.diff(buckets, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(buckets)], strict=True):
            (batch,) = table.slice(start, end - start).to_batches()
            self._writer.write_batch(batch)
            self._batches.setdefault(int(buckets[start]), []).append(self._num_batches)
            self._num_batches += 1

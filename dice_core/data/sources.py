"""Reads the user's prompts and preference pairs: a JSONL or Parquet file, a folder of them, or a data set on the Hub.

Brings every row to plain text columns (rows.py says how) and names the line at fault. `preparing.py` drops duplicates
and long rows and splits the rest; the stage fetches files from S3.
"""

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dice_core.data.line_errors import explain
from dice_core.data.records import RecordError
from dice_core.data.rows import (
    EMPTY,
    FINISH_REASON,
    PROMPT_COLUMNS,
    SIDE_COLUMNS,
    Texts,
    UnusableRow,
    has_text,
    kind,
    preference_row,
    prompt_row,
    response_rows,
)
from dice_core.data.settings import DataConfig
from dice_core.data.source_files import files_below
from dice_core.hub_access import is_hub_out_of_reach

ROWS_PER_BATCH = 8192

# 64-bit offsets: the text of a million preference pairs passes the 2 GiB of Arrow's `string`.
PROMPT_TEXT = pa.schema([pa.field("prompt", pa.large_string(), False)])
PREFERENCE_TEXT = pa.schema([pa.field(name, pa.large_string(), False) for name in ("prompt", "chosen", "rejected")])
RESPONSE_TEXT = pa.schema([pa.field(name, pa.large_string(), False) for name in ("prompt", "response")])

_HUB_SOURCE = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?(:((?P<config>[\w.-]+)/)?(?P<split>.+))?"
)
_FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".txt", ".gz", ".zst")
_DEFAULT_SPLIT = "train"
# Where a data set's training split has another name.
_KNOWN_SPLITS = {"HuggingFaceH4/ultrafeedback_binarized": "train_prefs"}


@dataclass(frozen=True)
class Rows:
    """What a source held."""

    table: pa.Table
    """PROMPT_TEXT, PREFERENCE_TEXT or RESPONSE_TEXT, in the order of the source."""
    num_dropped: Mapping[str, int]
    """Rows that are valid but of no use here, by reason."""
    source: str
    """Its name in messages."""
    num_cleaned: Mapping[str, int] = field(default_factory=dict)
    """Rows of the table whose texts are not the source's own, by reason."""


def read_prompts(
    source: str, config: DataConfig | None = None, *, name: str = "", rows_per_batch: int = ROWS_PER_BATCH
) -> Rows:
    """Read rows with `prompt` (or upstream DICE's `instruction`, with Alpaca's `input`): a text, or a list of messages.

    Args:
        source: a file (JSONL, plain or as .gz, or Parquet: told apart by content), a folder of such files at any
            depth (source_files.py), or a Hub data set as `ORG/NAME[@REVISION][:[CONFIG/]SPLIT]`.
        config: what becomes of rows that say more than the texts; the defaults by default.
        name: what messages call it, where `source` is the copy of something remote.
        rows_per_batch: how many are Python objects at a time.

    Raises:
        RecordError: nothing there, nothing in it, or a row without usable text: one line with the file and the line.
    """
    wanted = _Wanted(name or source, PROMPT_COLUMNS, rows_per_batch)
    return _read(source, wanted, PROMPT_TEXT, _one(prompt_row), config)


def read_preferences(source: str, config: DataConfig | None = None, *, name: str = "") -> Rows:
    """Read rows with `prompt`, `chosen` and `rejected`; the latter two are texts, or lists of messages.

    A list of messages is one question and its answer, or the answer alone; one that is written as JSON text is read as
    well. Rows with more turns or a system message are dropped and counted: this project aligns single turns.

    Args:
        source: as for read_prompts.
        config: as for read_prompts.
        name: as for read_prompts.

    Raises:
        RecordError: as for read_prompts.
    """
    wanted = _Wanted(name or source, (*PROMPT_COLUMNS, "chosen", "rejected"))
    return _read(source, wanted, PREFERENCE_TEXT, _one(preference_row), config)


def read_responses(source: str, config: DataConfig | None = None, *, name: str = "") -> Rows:
    """Read rows with `prompt` and either `response` (a text, or a list of messages) or `responses` (a list of texts).

    Args:
        source: as for read_prompts.
        config: as for read_prompts.
        name: as for read_prompts.

    Raises:
        RecordError: as for read_prompts.
    """
    wanted = _Wanted(name or source, (*PROMPT_COLUMNS, "response", "responses", FINISH_REASON))
    return _read(source, wanted, RESPONSE_TEXT, response_rows, config)


@dataclass(frozen=True)
class _Wanted:
    """What is read of a source."""

    shown: str
    """Its name in messages."""
    columns: tuple[str, ...]
    """One at least must be there; those beside the texts are read where they are."""
    rows_per_batch: int = ROWS_PER_BATCH

    def present(self, names: Sequence[str], shown: str) -> list[str]:
        """Return the names of the columns to read."""
        found = [name for name in self.columns if name in names]
        if not found:
            raise RecordError(
                f"{shown}: has no column {' or '.join(self.columns)}, it has {', '.join(names) or 'none'}"
            )
        return [*found, *(name for name in SIDE_COLUMNS if name in names)]


_RowReader = Callable[[Mapping[str, Any], str, DataConfig], list[Texts]]


def _one(read_row: Callable[[Mapping[str, Any], str, DataConfig], Texts]) -> _RowReader:
    return lambda row, where, config: [read_row(row, where, config)]


def _read(source: str, wanted: _Wanted, schema: pa.Schema, read_row: _RowReader, config: DataConfig | None) -> Rows:
    batches: list[pa.RecordBatch] = []
    pending: list[tuple[str, ...]] = []
    dropped, cleaned = Counter[str](), Counter[str]()
    num_rows = 0
    for where, row in _raw_rows(source, wanted):
        num_rows += 1
        try:
            read = read_row(row, where, config or DataConfig())
        except UnusableRow as reason:
            dropped[str(reason)] += 1
            continue
        pending += [texts.texts for texts in read]
        cleaned.update(reason for texts in read for reason in texts.cleaned)
        if len(pending) >= wanted.rows_per_batch:
            batches.append(_batch(pending, schema))
            pending = []
    if not num_rows:
        raise RecordError(f"{wanted.shown}: is empty, needs at least one row with {_needs(schema)}")
    batches.append(_batch(pending, schema))
    return Rows(pa.Table.from_batches(batches, schema), dict(dropped), wanted.shown, dict(cleaned))


def _batch(rows: Sequence[tuple[str, ...]], schema: pa.Schema) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema
    )


def _needs(schema: pa.Schema) -> str:
    return ", ".join(f"'{name}'" for name in schema.names)


# Rows as the source has them: ("FILE line 3", {"prompt": ...}).


def _raw_rows(source: str, wanted: _Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    path, shown = Path(source), wanted.shown
    # os.path, since a source that is too long for a name raises in pathlib.
    if os.path.isdir(path):
        for name in files_below(path, shown):
            yield from _file_rows(path / name, f"{shown.rstrip('/')}/{name}", wanted)
    elif os.path.exists(path):
        yield from _file_rows(path, shown, wanted)
    else:
        yield from _hub_rows(source, wanted)


def _file_rows(path: Path, shown: str, wanted: _Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"PAR1":
            yield from _parquet_rows(path, shown, wanted)
        else:
            with (gzip.open if magic.startswith(b"\x1f\x8b") else open)(path, "rb") as file:
                yield from _jsonl_rows(file, shown, wanted)
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _jsonl_rows(lines: Iterable[bytes], shown: str, wanted: _Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        where = f"{shown} line {number}"
        try:
            # Some editors begin a UTF-8 file with a byte order mark.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: {explain(line, number, error)}") from None
        if not isinstance(row, dict):
            raise RecordError(f"{where}: must be one JSON object with {', '.join(wanted.columns)}, got {kind(row)}")
        yield where, row


def _parquet_rows(path: Path, shown: str, wanted: _Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(path)
        present = wanted.present(file.schema_arrow.names, shown)
        yield from _arrow_rows(file.iter_batches(wanted.rows_per_batch, columns=present), shown)
    except pa.ArrowException as error:
        raise RecordError(f"{shown}: not a readable Parquet file: {_one_line(error)}") from None


def _arrow_rows(batches: Iterator[Any], shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            last = number + batch.num_rows
            raise RecordError(f"{shown} rows {number + 1} to {last}: text that is not UTF-8 in one of them") from None
        for row in rows:
            number += 1
            yield f"{shown} row {number}", row


def _hub_rows(source: str, wanted: _Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    shown = wanted.shown
    match = _HUB_SOURCE.fullmatch(source)
    if match is None or source.endswith(_FILE_SUFFIXES):
        raise RecordError(f"{shown}: no such file or folder, and not a Hub data set (ORG/NAME[@REVISION][:SPLIT])")
    dataset = _load_hub_dataset(match["name"], match["config"], match["split"], match["revision"], shown)
    present = wanted.present(dataset.column_names, shown)
    batches = dataset.select_columns(present).with_format("arrow").iter(wanted.rows_per_batch)
    for where, row in _arrow_rows(batches, shown):
        # Nobody can correct a row on the Hub: what has no text is dropped and counted, not an error.
        yield where, {key: value if key in SIDE_COLUMNS or has_text(value) else EMPTY for key, value in row.items()}


def _load_hub_dataset(name: str, config: str | None, split: str | None, revision: str | None, shown: str) -> Any:
    # Imported here: it takes a second, and only this source needs it.
    import datasets

    is_cached = Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir()
    if not is_cached and is_hub_out_of_reach():
        raise RecordError(f"{shown}: no such file or folder, and the Hub cannot be reached to look for a data set")
    split = split or _KNOWN_SPLITS.get(name, _DEFAULT_SPLIT)
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RecordError(
            f"{shown}: no such file or folder, and data set {name!r} with split {split!r} could not be had from the "
            f"Hub: {_one_line(error)}"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

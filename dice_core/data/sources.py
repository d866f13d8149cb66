"""Reads the user's prompts and preference pairs: a JSONL or Parquet file, a folder of them, or a data set on the Hub.

Brings every row to plain text columns and names the line at fault. `preparing.py` drops duplicates and long rows and
splits the rest; the stage fetches files from S3.
"""

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dice_core.data.records import RecordError
from dice_core.data.source_files import files_below
from dice_core.hub_access import is_hub_out_of_reach

ROWS_PER_BATCH = 8192

# 64-bit offsets: the text of a million preference pairs passes the 2 GiB of Arrow's `string`.
PROMPT_TEXT = pa.schema([pa.field("prompt", pa.large_string(), False)])
PREFERENCE_TEXT = pa.schema([pa.field(name, pa.large_string(), False) for name in ("prompt", "chosen", "rejected")])

_PROMPT_KEYS = ("prompt", "instruction")
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
    """PROMPT_TEXT or PREFERENCE_TEXT, in the order of the source."""
    num_dropped: Mapping[str, int]
    """Rows that are valid but of no use here, by reason."""
    source: str
    """Its name in messages."""


class _UnusableRow(Exception):
    """A valid row that cannot become a prompt or a pair; the message is the reason it is counted under."""


def read_prompts(source: str, *, name: str = "") -> Rows:
    """Read rows with `prompt` (or upstream DICE's `instruction`): a text, or a list of messages.

    Args:
        source: a file (JSONL, plain or as .gz, or Parquet: told apart by content), a folder of such files at any
            depth (source_files.py), or a Hub data set as `ORG/NAME[@REVISION][:[CONFIG/]SPLIT]`.
        name: what messages call it, where `source` is the copy of something remote.

    Raises:
        RecordError: nothing there, nothing in it, or a row without usable text: one line with the file and the line.
    """
    return _read(source, name, PROMPT_TEXT, _prompt_row)


def read_preferences(source: str, *, name: str = "") -> Rows:
    """Read rows with `prompt`, `chosen` and `rejected`; the latter two are texts, or lists of messages.

    A list of messages is one question and its answer, or the answer alone. Rows with more turns or a system message
    are dropped and counted: this project aligns single turns.

    Args:
        source: as for read_prompts.
        name: as for read_prompts.

    Raises:
        RecordError: as for read_prompts.
    """
    return _read(source, name, PREFERENCE_TEXT, _preference_row)


_RowReader = Callable[[dict[str, Any], str], tuple[str, ...]]


def _read(source: str, name: str, schema: pa.Schema, read_row: _RowReader) -> Rows:
    shown = name or source
    columns = (*_PROMPT_KEYS, *schema.names[1:])
    batches: list[pa.RecordBatch] = []
    pending: list[tuple[str, ...]] = []
    dropped: Counter[str] = Counter()
    num_rows = 0
    for where, row in _raw_rows(source, shown, columns):
        num_rows += 1
        try:
            pending.append(read_row(row, where))
        except _UnusableRow as reason:
            dropped[str(reason)] += 1
        if len(pending) == ROWS_PER_BATCH:
            batches.append(_batch(pending, schema))
            pending = []
    if not num_rows:
        raise RecordError(f"{shown}: is empty, needs at least one row with {_needs(schema)}")
    batches.append(_batch(pending, schema))
    return Rows(pa.Table.from_batches(batches, schema), dict(dropped), shown)


def _batch(rows: Sequence[tuple[str, ...]], schema: pa.Schema) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema
    )


def _needs(schema: pa.Schema) -> str:
    return ", ".join(f"'{name}'" for name in schema.names)


# Rows as the source has them: ("FILE line 3", {"prompt": ...}).


def _raw_rows(source: str, shown: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source)
    # os.path, since a source that is too long for a name raises in pathlib.
    if os.path.isdir(path):
        for name in files_below(path, shown):
            yield from _file_rows(path / name, f"{shown.rstrip('/')}/{name}", columns)
    elif os.path.exists(path):
        yield from _file_rows(path, shown, columns)
    else:
        yield from _hub_rows(source, shown, columns)


def _file_rows(path: Path, shown: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"PAR1":
            yield from _parquet_rows(path, shown, columns)
        else:
            with (gzip.open if magic.startswith(b"\x1f\x8b") else open)(path, "rb") as file:
                yield from _jsonl_rows(file, shown, columns)
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _jsonl_rows(lines: Iterable[bytes], shown: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        where = f"{shown} line {number}"
        try:
            # Some editors begin a UTF-8 file with a byte order mark.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = json.loads(text)
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{where}: not UTF-8 at byte {error.start + 1} (0x{line[error.start]:02x}): "
                "save the file as UTF-8 JSONL, plain or as .gz"
            ) from None
        except (ValueError, RecursionError) as error:
            raise RecordError(
                f'{where}: not valid JSON ({error}): each line must be one JSON object, such as {{"prompt": "..."}}'
            ) from None
        if not isinstance(row, dict):
            raise RecordError(f"{where}: must be one JSON object with {', '.join(columns)}, got {_kind(row)}")
        yield where, row


def _parquet_rows(path: Path, shown: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(path)
        present = _present(file.schema_arrow.names, columns, shown)
        yield from _arrow_rows(file.iter_batches(ROWS_PER_BATCH, columns=present), shown)
    except pa.ArrowException as error:
        raise RecordError(f"{shown}: not a readable Parquet file: {_one_line(error)}") from None


def _present(names: Sequence[str], columns: Sequence[str], shown: str) -> list[str]:
    present = [name for name in columns if name in names]
    if not present:
        raise RecordError(f"{shown}: has no column {' or '.join(columns)}, it has {', '.join(names) or 'none'}")
    return present


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


def _hub_rows(source: str, shown: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    match = _HUB_SOURCE.fullmatch(source)
    if match is None or source.endswith(_FILE_SUFFIXES):
        raise RecordError(f"{shown}: no such file or folder, and not a Hub data set (ORG/NAME[@REVISION][:SPLIT])")
    dataset = _load_hub_dataset(match["name"], match["config"], match["split"], match["revision"], shown)
    present = _present(dataset.column_names, columns, shown)
    batches = dataset.select_columns(present).with_format("arrow").iter(ROWS_PER_BATCH)
    for where, row in _arrow_rows(batches, shown):
        # Nobody can correct a row on the Hub: what has no text is dropped and counted, not an error.
        yield where, {key: value if _has_text(value) else _EMPTY for key, value in row.items()}


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


# One row to plain texts.


class _Empty:
    """Stands for a Hub value without text."""


_EMPTY = _Empty()


def _has_text(value: object) -> bool:
    if isinstance(value, list):
        return all(not isinstance(message, dict) or _has_text(message.get("content")) for message in value)
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def _prompt_row(row: dict[str, Any], where: str) -> tuple[str, ...]:
    key = _prompt_key(row)
    if key is None:
        raise RecordError(f"{where}: has neither 'prompt' nor 'instruction', it has {_keys(row)}")
    return (_prompt_text(row[key], key, where),)


def _preference_row(row: dict[str, Any], where: str) -> tuple[str, ...]:
    chosen_prompt, chosen = _answer(row, "chosen", where)
    rejected_prompt, rejected = _answer(row, "rejected", where)
    key = _prompt_key(row)
    prompt = _prompt_text(row[key], key, where) if key else chosen_prompt
    if prompt is None:
        raise RecordError(f"{where}: 'prompt' is missing, it has {_keys(row)}")
    said = {text for text in (chosen_prompt, rejected_prompt) if text is not None}
    if any(text.strip() != prompt.strip() for text in said):
        # The pair compares answers to different questions, or to something other than the prompt.
        raise _UnusableRow("prompts_differ")
    return prompt, chosen, rejected


def _prompt_key(row: Mapping[str, Any]) -> str | None:
    return next((key for key in _PROMPT_KEYS if key in row), None)


def _prompt_text(value: object, key: str, where: str) -> str:
    if isinstance(value, list):
        messages = _messages(value, key, where)
        if [role for role, _ in messages] != ["user"]:
            raise _UnusableRow("not_single_turn")
        return messages[0][1]
    return _text(value, key, where)


def _answer(row: Mapping[str, Any], key: str, where: str) -> tuple[str | None, str]:
    """Return the question a list of messages begins with (None where there is none), and the answer."""
    if key not in row:
        raise RecordError(f"{where}: {key!r} is missing, it has {_keys(row)}")
    value = row[key]
    if not isinstance(value, list):
        return None, _text(value, key, where)
    messages = _messages(value, key, where)
    roles = [role for role, _ in messages]
    if roles not in (["user", "assistant"], ["assistant"]):
        raise _UnusableRow("not_single_turn")
    return (messages[0][1] if len(messages) == 2 else None), messages[-1][1]


def _messages(value: list[object], key: str, where: str) -> list[tuple[str, str]]:
    if not value:
        raise RecordError(f"{where}: {key!r} has no message")
    found = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RecordError(
                f"{where}: message {number} of {key!r} must have 'role' and 'content', got {_show(message)}"
            )
        found.append((message["role"], _text(message.get("content"), f"{key}[{number - 1}].content", where)))
    return found


def _text(value: object, key: str, where: str) -> str:
    if value is _EMPTY:
        raise _UnusableRow("empty")
    if not isinstance(value, str):
        raise RecordError(f"{where}: {key!r} must be text or a list of messages, got {_kind(value)}")
    if not value.strip():
        raise RecordError(f"{where}: {key!r} is empty, write a text or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where}: {key!r} has half a surrogate pair (\\u{ord(value[error.start]):04x}) at character "
            f"{error.start + 1}, which is no Unicode text"
        ) from None
    return value


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(repr, row))[:8]) or "nothing"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return "null" if value is None else f"{names.get(type(value), type(value).__name__)}, {_show(value)}"


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

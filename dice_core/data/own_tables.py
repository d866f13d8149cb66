"""Prompts and preference pairs that come as a person's own Parquet table, past prepare-data: the same cleaning. Pure.

Rows are told apart as prepare-data does where nothing else is set (DataConfig). What needs more than a row, such as
duplicates and benchmarks, is prepare-data's alone.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from dice_core.data.records import ROWS_AT_A_TIME, RecordError
from dice_core.data.rows import after_prompt, control_token_pattern
from dice_core.data.settings import DataConfig

_ANSWERS = ("chosen", "rejected")


def clean_table(table: pa.Table, control_tokens: Iterable[str], where: str) -> tuple[pa.Table, Counter[str]]:
    """Return a table without the rows that prepare-data drops for their texts, and the numbers of what was done.

    Args:
        table: records.PROMPTS or records.PREFERENCES.
        control_tokens: of chat templates; a text with one of them is templated already.
        where: what messages call the table.

    Returns:
        The table, and num_dropped_own_<reason> (control_tokens, empty, duplicate) and num_cleaned_own_repeated_prompt.

    Raises:
        RecordError: no row is left, or a prompt_id stands for two prompts.
    """
    pattern, counts = control_token_pattern(control_tokens, DataConfig()), Counter[str]()
    seen: dict[str, str] = {}
    pieces = []
    for batch in table.to_batches(max_chunksize=ROWS_AT_A_TIME):
        kept = []
        for row in batch.to_pylist():
            answers = _without_prompt(row)
            texts = [row["prompt"], *answers.values()]
            if seen.get(row["prompt_id"], row["prompt"]) != row["prompt"]:
                raise RecordError(f"{where}: prompt_id {row['prompt_id']!r} stands for two prompts: give each its own")
            if not answers and row["prompt_id"] in seen:
                counts["num_dropped_own_duplicate"] += 1
                continue
            seen[row["prompt_id"]] = row["prompt"]
            if pattern and any(map(pattern.search, texts)):
                counts["num_dropped_own_control_tokens"] += 1
            elif not all(text.strip() for text in texts):
                counts["num_dropped_own_empty"] += 1
            else:
                counts["num_cleaned_own_repeated_prompt"] += any(row[name] != text for name, text in answers.items())
                kept.append(row | answers)
        pieces.append(pa.Table.from_pylist(kept, schema=table.schema))
    counts = +counts
    left = pa.concat_tables([table.schema.empty_table(), *pieces])
    if table.num_rows and not left.num_rows:
        told = ", ".join(f"{count} {name.removeprefix('num_dropped_own_')}" for name, count in sorted(counts.items()))
        raise RecordError(f"{where}: no row is left, dropped: {told}")
    return left, counts


def _without_prompt(row: dict[str, Any]) -> dict[str, str]:
    """Return the answers of a row without the prompt that they repeat in front of themselves."""
    prompt = row["prompt"].strip()
    found = {name: row[name] for name in _ANSWERS if name in row}
    rest = {name: after_prompt(prompt, answer) if prompt else None for name, answer in found.items()}
    return {name: answer if rest[name] is None else str(rest[name]).lstrip() for name, answer in found.items()}

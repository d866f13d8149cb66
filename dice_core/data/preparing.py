"""Turns the user's prompts and preference pairs into the three tables a run starts from. Pure.

What is kept does not depend on the order of the rows: rows are ordered by a hash of the seed and their text, and splits
and subsets are beginnings of that order. A row added to the source therefore moves few others between the splits.
sources.py reads the rows, the stage writes the tables.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dice_core.data.decontamination import BenchmarkIndex, benchmark_index, normalised_text
from dice_core.data.records import PREFERENCES, PROMPTS, ROWS_AT_A_TIME, RecordError, prompt_id, take_text
from dice_core.data.rows import control_token_pattern
from dice_core.data.same_tokens import Tokenise, same_tokens
from dice_core.data.settings import DataConfig
from dice_core.data.sources import Rows
from dice_core.settings.base import ConfigError


@dataclass(frozen=True)
class Prepared:
    """The tables of a run, and what became of every row."""

    prompts: pa.Table
    """records.PROMPTS, each normalised text once, none of held_out."""
    preferences: pa.Table
    """records.PREFERENCES, for replay and the warm start."""
    held_out: pa.Table
    """records.PREFERENCES, for evaluation; no prompt of it is in the other two."""
    counts: dict[str, int]
    """num_prompts, num_preferences, num_held_out, and num_{dropped,cleaned}_{prompts,preferences}_<reason>.

    Rows of a source = its rows kept + its rows dropped. Without a prompts source, the rows of prompts are those of
    preferences. A cleaned row was changed when it was read, and may be dropped for another reason."""


@dataclass(frozen=True)
class _Rules:
    config: DataConfig
    num_prompt_tokens: Callable[[list[str]], list[int]]
    max_prompt_tokens: int
    benchmark: BenchmarkIndex
    control_tokens: re.Pattern[str] | None
    tokenise_response: Tokenise
    seed: int
    rows_at_a_time: int


class _Row(NamedTuple):
    """Where a kept row stands in the seeded order. Sorts by that order, equal texts side by side."""

    rank: bytes
    """Hash of the seed and the normalised prompt: the same for all rows of a prompt."""
    text: bytes
    """Digest of the row's normalised texts: rows that share it are duplicates."""
    exact: bytes
    """Digest of the texts as they are: decides which duplicate stays."""
    position: int
    """In the source's table."""


def prepare(
    prompts: Rows | None,
    preferences: Rows,
    config: DataConfig,
    *,
    seed: int,
    num_prompt_tokens: Callable[[list[str]], list[int]],
    max_prompt_tokens: int,
    benchmark_prompts: Iterable[str] = (),
    control_tokens: Iterable[str] = (),
    tokenise_response: Tokenise = str.encode,
    rows_at_a_time: int = ROWS_AT_A_TIME,
) -> Prepared:
    """Check, clean and split.

    A row is dropped, and counted under the first reason that holds, when its prompt is in the benchmark
    (`in_benchmark`), a text has a control token (`control_tokens`), its answers are the same (`same_answers`) or too
    long (`response_too_long`), its prompt is longer than `max_prompt_tokens` (`prompt_too_long`), or its normalised
    texts repeat another row's (`duplicate`). Several different pairs of one prompt are kept, always in the same split.
    Prompts of held_out are left out of `prompts` (`held_out`), so that evaluation asks what training has not seen.

    Args:
        prompts: to generate on; None takes those of the preferences.
        preferences: the user's pairs.
        config: all but what the reading of the rows went by.
        seed: of the splits and the subset.
        num_prompt_tokens: lengths in tokens of prompts as generation will render them.
        max_prompt_tokens: the longest that is kept.
        benchmark_prompts: prompts of evaluations, to be left out everywhere.
        control_tokens: those of chat templates; looked for by config.control_tokens.
        tokenise_response: an answer to its token ids: two answers with the same ids are the same.
        rows_at_a_time: rows turned into Python objects at a time; the tables themselves stay in Arrow.

    Raises:
        ConfigError: num_held_out leaves no pair to train on.
        RecordError: no prompt or no pair is left; the message says where they went.
    """
    benchmark = benchmark_index(benchmark_prompts, config.decontamination_words)
    pattern = control_token_pattern(control_tokens, config)
    rules = _Rules(
        config, num_prompt_tokens, max_prompt_tokens, benchmark, pattern, tokenise_response, seed, rows_at_a_time
    )
    kept, dropped = _clean(preferences, rules)
    num_held_out = _num_held_out_rows(kept, config, preferences, dropped)
    held_out, replayed = kept[:num_held_out], kept[num_held_out:]
    if config.max_preferences:
        dropped["not_sampled"] = max(0, len(replayed) - config.max_preferences)
        replayed = replayed[: config.max_preferences]
    if prompts is None:
        prompt_rows, prompts_dropped = _without_duplicates(_by_prompt(replayed)), Counter[str]()
        prompts_dropped["duplicate"] = len(replayed) - len(prompt_rows)
        prompts = preferences
    else:
        prompt_rows, prompts_dropped = _clean(prompts, rules)
        prompt_rows = _without_held_out(prompt_rows, held_out, prompts_dropped)
    if not prompt_rows:
        raise RecordError(f"{prompts.source}: no prompt is left to generate on, {_where_they_went(prompts_dropped)}")
    if config.max_prompts:
        prompts_dropped["not_sampled"] = max(0, len(prompt_rows) - config.max_prompts)
        prompt_rows = prompt_rows[: config.max_prompts]
    tables = (
        _table(prompts.table, prompt_rows, PROMPTS, rows_at_a_time),
        _table(preferences.table, replayed, PREFERENCES, rows_at_a_time),
        _table(preferences.table, held_out, PREFERENCES, rows_at_a_time),
    )
    cleaned = {"prompts": {} if prompts is preferences else prompts.num_cleaned, "preferences": preferences.num_cleaned}
    return Prepared(*tables, counts=_counts(tables, {"prompts": prompts_dropped, "preferences": dropped}, cleaned))


def _clean(rows: Rows, rules: _Rules) -> tuple[list[_Row], Counter[str]]:
    """Return the rows that stay, in the seeded order, and the numbers of the others by reason."""
    dropped = Counter(dict(rows.num_dropped))
    kept = []
    position = 0
    for batch in rows.table.to_batches(max_chunksize=rules.rows_at_a_time):
        texts = list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
        lengths = rules.num_prompt_tokens([text[0] for text in texts]) if texts else []
        same = _same_answers(batch, rules)
        for row, num_tokens, is_same in zip(texts, lengths, same, strict=True):
            if reason := _fault(row, num_tokens, is_same, rules):
                dropped[reason] += 1
            else:
                kept.append(_row(row, position, rules.seed))
            position += 1
    kept.sort()
    unique = _without_duplicates(kept)
    dropped["duplicate"] += len(kept) - len(unique)
    return unique, dropped


def _same_answers(rows: pa.RecordBatch, rules: _Rules) -> NDArray[np.bool_]:
    if "chosen" not in rows.schema.names:
        return np.zeros(rows.num_rows, dtype=bool)
    chosen, rejected = (pc.utf8_trim_whitespace(rows[name]) for name in ("chosen", "rejected"))
    return same_tokens(chosen, rejected, rules.tokenise_response)


def _fault(texts: Sequence[str], num_tokens: int, is_same: bool, rules: _Rules) -> str:
    prompt, *answers = texts
    if rules.benchmark.contains(prompt):
        return "in_benchmark"
    if rules.control_tokens and any(map(rules.control_tokens.search, texts)):
        return "control_tokens"
    if is_same:
        return "same_answers"
    if any(len(answer) > rules.config.max_response_characters for answer in answers):
        return "response_too_long"
    return "prompt_too_long" if num_tokens > rules.max_prompt_tokens else ""


def _row(texts: Sequence[str], index: int, seed: int) -> _Row:
    normalised = [normalised_text(text) for text in texts]
    rank = _digest(["split", str(seed), normalised[0]])
    return _Row(rank, _digest(normalised), _digest(texts), index)


def _digest(texts: Iterable[str]) -> bytes:
    """Return 128 bits of the texts; each is preceded by its length, so that no two lists read the same."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()[:16]


def _by_prompt(rows: Sequence[_Row]) -> list[_Row]:
    """Return the rows with the prompt alone as their text: of several pairs of a prompt the first stays."""
    return [_Row(row.rank, row.rank, row.exact, row.position) for row in rows]


def _without_duplicates(rows: Sequence[_Row]) -> list[_Row]:
    """Keep the first of each text; the rows are sorted."""
    return [row for number, row in enumerate(rows) if not number or rows[number - 1].text != row.text]


def _without_held_out(rows: Sequence[_Row], held_out: Sequence[_Row], dropped: Counter[str]) -> list[_Row]:
    ranks = {row.rank for row in held_out}
    kept = [row for row in rows if row.rank not in ranks]
    dropped["held_out"] = len(rows) - len(kept)
    return kept


def _num_held_out_rows(kept: Sequence[_Row], config: DataConfig, source: Rows, dropped: Counter[str]) -> int:
    """Return the length of the held-out beginning: num_held_out, or a few more where a prompt has several pairs."""
    if not kept:
        raise RecordError(f"{source.source}: no preference pair is left, {_where_they_went(dropped)}")
    end = config.num_held_out
    while 0 < end < len(kept) and kept[end].rank == kept[end - 1].rank:
        end += 1
    if end >= len(kept) and kept[0].rank == kept[-1].rank:
        raise ConfigError(
            f"{source.source}: all {len(kept)} usable pairs have one prompt, and held-out pairs are whole prompts, "
            "which training does not see: give pairs of at least two prompts"
        )
    if end >= len(kept):
        raise ConfigError(
            f"data.num_held_out: must leave pairs to train on, {source.source} has {len(kept)} usable pairs, "
            f"got {config.num_held_out}"
        )
    return end


def _where_they_went(dropped: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()) if count)
    return f"dropped: {reasons or 'none'}"


def _table(source: pa.Table, rows: Sequence[_Row], schema: pa.Schema, rows_at_a_time: int) -> pa.Table:
    """Return the rows in their order."""
    positions = np.array([row.position for row in rows], dtype=np.int64)
    columns = {name: take_text(source[name], positions, rows_at_a_time) for name in schema.names if name != "prompt_id"}
    columns["prompt_id"] = pa.chunked_array(
        [[prompt_id(text) for text in chunk.to_pylist()] for chunk in columns["prompt"].chunks], pa.string()
    )
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _counts(
    tables: Sequence[pa.Table], dropped: Mapping[str, Mapping[str, int]], cleaned: Mapping[str, Mapping[str, int]]
) -> dict[str, int]:
    names = ("num_prompts", "num_preferences", "num_held_out")
    counts = {name: table.num_rows for name, table in zip(names, tables, strict=True)}
    for what, kinds in (("dropped", dropped), ("cleaned", cleaned)):
        for kind, reasons in kinds.items():
            counts |= {f"num_{what}_{kind}_{reason}": count for reason, count in sorted(reasons.items()) if count}
    return counts

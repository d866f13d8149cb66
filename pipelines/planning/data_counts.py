"""How many prompts and pairs a run has, and how long they are: of a run that has prepared them, of a file, of a table.

What only the whole data tell (rows that prepare-data drops) is not known before: counts are of the rows there are.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_core.data.settings import DataConfig
from dice_core.settings.base import ConfigError
from dice_core.storage import layout
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import read_manifest
from pipelines.planning.known_models import CHARACTERS_PER_TOKEN
from pipelines.planning.ranges import Range
from pipelines.presets import Preset

_TEMPLATE_TOKENS = Range(9, 35)
"""What a chat template puts around a prompt. Counted: 32 of SmolLM2's, with its system prompt; the least is assumed."""


@dataclass(frozen=True)
class TextLengths:
    """Mean tokens of a prompt with its template, and of a response of an offline pair."""

    prompt: Range
    response: Range


@dataclass(frozen=True)
class DataSet:
    """Rows of a source, and their lengths."""

    num_rows: int
    lengths: TextLengths
    source: str


@dataclass(frozen=True)
class DataCounts:
    """What prepare-data will make."""

    num_prompts: int
    num_preferences: int
    num_held_out: int
    lengths: TextLengths
    source: str


KNOWN_SETS: Mapping[str, DataSet] = {
    "HuggingFaceH4/ultrafeedback_binarized": DataSet(
        61_135,
        # A row is the prompt four times and three responses: 405,688,662 bytes. Prompts of 100 to 200 tokens leave
        # responses of 370 to 236.
        TextLengths(Range(100, 200), Range(236, 370)),
        "the data set's card: 61,135 rows of 6,636 bytes (four times the prompt, three responses)",
    )
}


def counts_of(preset: Preset, run_uri: str = "") -> DataCounts | None:
    """Return the counts of a preset's data; None where nothing tells them.

    Args:
        preset: names the sources.
        run_uri: of a run that has prepared them.

    Raises:
        ConfigError: the run has not prepared its data, or a file has no pairs.
    """
    data = _data_set(preset.preferences_source)
    if run_uri:
        return _of_run(run_uri, data)
    if data is None:
        return None
    held_out = min(preset.data.num_held_out, max(data.num_rows - 1, 1))
    pairs = _limited(data.num_rows - held_out, preset.data.max_preferences)
    prompts = _num_prompts(preset, preset.data, pairs)
    return None if prompts is None else DataCounts(prompts, pairs, held_out, data.lengths, data.source)


def _num_prompts(preset: Preset, data: DataConfig, num_pairs: int) -> int | None:
    """Return the prompts: those of the pairs, where no source of their own is named."""
    if not preset.prompts_source:
        return _limited(num_pairs, data.max_prompts)
    path = Path(preset.prompts_source)
    if path.is_file() and path.suffix in (".jsonl", ".ndjson", ".txt", ".parquet"):
        return _limited(sum(1 for _ in _rows(path)), data.max_prompts)
    return data.max_prompts or None


def _limited(number: int, limit: int) -> int:
    return min(number, limit) if limit else number


def _of_run(run_uri: str, data: DataSet | None) -> DataCounts:
    uri = layout.data(run_uri)
    try:
        manifest = read_manifest(uri)
    except StorageError as error:
        raise ConfigError(f"{error} (RUN= is read there: leave it out to plan without)") from None
    if manifest is None:
        raise ConfigError(f"{uri}: the run has not prepared its data: leave out RUN=, or wait for prepare-data")
    prompts, pairs, held_out = (int(manifest.metrics[n]) for n in ("num_prompts", "num_preferences", "num_held_out"))
    lengths = data.lengths if data else TextLengths(Range(50, 400), Range(150, 500))
    source = f"{uri}; lengths: {data.source if data else 'assumed'}"
    return DataCounts(prompts, pairs, held_out, lengths, source)


def _data_set(source: str) -> DataSet | None:
    """Return what is known of a source of pairs."""
    name = source.split("@")[0].split(":")[0]
    if name in KNOWN_SETS:
        return KNOWN_SETS[name]
    path = Path(source)
    if not path.is_file() or path.suffix not in (".jsonl", ".ndjson", ".parquet"):
        return None
    sums = [0, 0, 0]
    for number, row in enumerate(_rows(path), 1):
        if not all(isinstance(row.get(field), str) for field in ("prompt", "chosen", "rejected")):
            return None
        sums = [number, sums[1] + len(row["prompt"]), sums[2] + len(row["chosen"]) + len(row["rejected"])]
    if not sums[0]:
        raise ConfigError(f"preferences_source: {source} has no rows")
    prompt = sums[1] / sums[0] / CHARACTERS_PER_TOKEN
    response = sums[2] / sums[0] / 2 / CHARACTERS_PER_TOKEN + 1
    lengths = TextLengths(Range(0.9 * prompt, 1.1 * prompt) + _TEMPLATE_TOKENS, Range(0.9 * response, 1.1 * response))
    return DataSet(sums[0], lengths, f"{source}: {sums[0]} rows, counted; 4.3 characters a token")


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    import pyarrow.json as pj
    import pyarrow.parquet as pq

    if path.suffix == ".txt":
        return ({"prompt": line} for line in path.read_text().splitlines())
    if path.suffix == ".parquet":
        batches = pq.ParquetFile(path).iter_batches()
        return itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    rows: list[Mapping[str, Any]] = pj.read_json(path).to_pylist()
    return rows

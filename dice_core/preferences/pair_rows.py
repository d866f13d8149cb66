"""The rows of training pairs, made when they are asked for: generated ones from responses, replayed ones from texts.

The responses of generated pairs wait in files, as they come in the order of the shards and are wanted in that of the
prompts. Which pairs there are, and what becomes of them, is pairs.py's business.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dice_core.data.records import PAIRS, PREFERENCES, PROMPTS, RESPONSES, conform, take_text
from dice_core.data.same_tokens import Tokenise, same_tokens
from dice_core.preferences.selection import PairError, Selection
from dice_core.preferences.spill import Spill

Ints = NDArray[np.int64]

_PART_ROWS = 65_536
_NEEDED_RESPONSES = pa.schema(
    [RESPONSES.field(n) for n in ("prompt_id", "sample_index", "prompt_token_ids", "response_token_ids", "response")]
)
# What is kept of the responses of a pair: both have one prompt.
_KEPT = {
    "chosen": pa.schema([RESPONSES.field(n) for n in ("prompt_token_ids", "response_token_ids", "response")]),
    "rejected": pa.schema([RESPONSES.field(n) for n in ("response_token_ids", "response")]),
}
_UNSPLIT = pa.schema([field for field in PAIRS if field.name != "split"])


@dataclass(frozen=True)
class ReplayedPairs:
    """Offline pairs, made into rows of PAIRS when they are asked for.

    Attributes:
        preferences: the table they are in.
        rows: [pairs] their rows there, in the order of their prompt_id.
    """

    preferences: pa.Table
    rows: Ints
    tokenise_prompt: Tokenise
    tokenise_response: Tokenise

    @property
    def prompt_ids(self) -> pa.Array:
        """[pairs] their prompts, ascending."""
        return take_text(self.preferences["prompt_id"], self.rows).combine_chunks()

    def table(self, pairs: Ints) -> pa.Table:
        """Return the rows of some pairs; all columns but the split."""
        texts = {name: take_text(self.preferences[name], self.rows[pairs]) for name in PREFERENCES.names}
        unknown = pa.nulls(len(pairs), pa.float64())
        columns = {
            **texts,
            "prompt_token_ids": [list(self.tokenise_prompt(text)) for text in texts["prompt"].to_pylist()],
            "chosen_token_ids": [list(self.tokenise_response(text)) for text in texts["chosen"].to_pylist()],
            "rejected_token_ids": [list(self.tokenise_response(text)) for text in texts["rejected"].to_pylist()],
            "chosen_reward": unknown,
            "rejected_reward": unknown,
            "chosen_reference_logps": unknown,
            "rejected_reference_logps": unknown,
            "source": np.full(len(pairs), "replayed"),
        }
        return _table(columns)


def read_offline(
    preferences: pa.Table, tokenise_prompt: Tokenise, tokenise_response: Tokenise
) -> tuple[ReplayedPairs, int]:
    """Return the offline pairs whose texts are different token ids, in an order of their own, and how many others."""
    table = conform(preferences, PREFERENCES, "preferences")
    differ = ~same_tokens(table["chosen"], table["rejected"], tokenise_response)
    order = pc.sort_indices(table, [(name, "ascending") for name in ("prompt_id", "chosen", "rejected")]).to_numpy()
    rows = order[differ[order]].astype(np.int64)
    return ReplayedPairs(table, rows, tokenise_prompt, tokenise_response), table.num_rows - len(rows)


def _parts(responses: pa.Table | Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in [responses] if isinstance(responses, pa.Table) else responses:
        for batch in table.to_batches(max_chunksize=_PART_ROWS):
            yield pa.Table.from_batches([batch])


@dataclass(frozen=True)
class FetchedResponses:
    """The responses of the candidates, on disk.

    Attributes:
        positions: [candidates] in the selection, ascending; the number of a candidate is its place here.
        responses: `chosen` and `rejected`, by that number.
        differ: [candidates] whether the two are different texts, and different token ids.
    """

    positions: Ints
    responses: dict[str, Spill]
    differ: NDArray[np.bool_]


def fetch_responses(
    selection: Selection, candidates: Ints, responses: pa.Table | Iterable[pa.Table], folder: Path, bucket_rows: int
) -> FetchedResponses:
    """Find the chosen and the rejected response of each candidate.

    Args:
        selection: the best and worst responses.
        candidates: positions in the selection, in any order.
        responses: RESPONSES tables, in any order; each is read once and let go.
        folder: gets the files.
        bucket_rows: as for `Spill`.

    Raises:
        PairError: a response is missing, or there twice.
        RecordError: a table without its columns.
    """
    token_hashes = {side: np.zeros(len(candidates), dtype=np.int64) for side in _KEPT}
    positions = np.sort(candidates)
    ids = selection.prompt_id.take(pa.array(positions)).to_pylist()
    numbers = {prompt_id: number for number, prompt_id in enumerate(ids)}
    indices = {"chosen": selection.chosen_index[positions], "rejected": selection.rejected_index[positions]}
    spills = {side: Spill(folder / f"{side}.arrow", _KEPT[side], len(ids), bucket_rows) for side in indices}
    hashes = {side: np.zeros(len(ids), dtype=np.int64) for side in indices}
    for part in _parts(responses) if ids else ():
        part = conform(part, _NEEDED_RESPONSES, "responses")
        rows, number = _known_rows(part["prompt_id"], numbers)
        sample_index = part["sample_index"].to_numpy()[rows]
        for side, wanted in indices.items():
            hits = np.flatnonzero(wanted[number] == sample_index)
            found = part.select(_KEPT[side].names).take(pa.array(rows[hits]))
            spills[side].add(number[hits], found)
            # Of 64 bits: that two texts of one prompt share theirs by chance will not happen.
            hashes[side][number[hits]] = [hash(text) for text in found["response"].to_pylist()]
            token_hashes[side][number[hits]] = _hashes(found["response_token_ids"])
    for spill in spills.values():
        spill.finish()
        _refuse_incomplete(spill.times_added, ids)
    differ = (hashes["chosen"] != hashes["rejected"]) & (token_hashes["chosen"] != token_hashes["rejected"])
    return FetchedResponses(positions, spills, differ)


def _hashes(lists: pa.ChunkedArray) -> list[int]:
    """Return a hash of the values of each list."""
    array = lists.combine_chunks()
    values, offsets = array.values.to_numpy(), array.offsets.to_numpy()
    return [hash(values[start:end].tobytes()) for start, end in itertools.pairwise(offsets)]


def _known_rows(prompt_ids: pa.ChunkedArray, numbers: dict[str, int]) -> tuple[Ints, Ints]:
    """Return the rows whose prompt has a number, and those numbers. A dictionary lookup per prompt, not per row."""
    encoded = prompt_ids.combine_chunks().dictionary_encode()
    number_of_code = np.array([numbers.get(text, -1) for text in encoded.dictionary.to_pylist()], dtype=np.int64)
    number = number_of_code[encoded.indices.to_numpy()]
    rows = np.flatnonzero(number >= 0)
    return rows, number[rows]


def _refuse_incomplete(times: NDArray[np.int32], ids: list[str]) -> None:
    wrong = np.flatnonzero(times != 1)
    if len(wrong):
        fault = "missing from the responses" if times[wrong[0]] == 0 else "in the responses more than once"
        raise PairError(
            f"pair: {len(wrong)} of {len(ids)} selected responses are not there exactly once, the first, of prompt_id "
            f"{ids[wrong[0]]}, is {fault}: give the very responses that were scored, each shard once"
        )


@dataclass(frozen=True)
class GeneratedPairs:
    """Generated pairs in the order of their prompt_id, made into rows of PAIRS when they are asked for.

    Attributes:
        positions: [pairs] in the selection, ascending.
        prompts: [pairs] the row of each in the table of prompts.
    """

    selection: Selection
    positions: Ints
    fetched: FetchedResponses
    prompt_texts: pa.ChunkedArray
    prompts: Ints

    @property
    def prompt_ids(self) -> pa.Array:
        """[pairs] their prompts, ascending."""
        return self.selection.prompt_id.take(pa.array(self.positions))

    def table(self, pairs: Ints) -> pa.Table:
        """Return the rows of some pairs, ascending; all columns but the split."""
        selection, positions = self.selection, self.positions[pairs]
        numbers = np.searchsorted(self.fetched.positions, positions)
        chosen, rejected = (self.fetched.responses[side].take(numbers) for side in ("chosen", "rejected"))
        columns = {
            "prompt_id": selection.prompt_id.take(pa.array(positions)),
            "prompt": take_text(self.prompt_texts, self.prompts[pairs]),
            "chosen": chosen["response"],
            "rejected": rejected["response"],
            "prompt_token_ids": chosen["prompt_token_ids"],
            "chosen_token_ids": chosen["response_token_ids"],
            "rejected_token_ids": rejected["response_token_ids"],
            "chosen_reward": selection.chosen_reward[positions],
            "rejected_reward": selection.rejected_reward[positions],
            "chosen_reference_logps": selection.chosen_policy_logps[positions],
            "rejected_reference_logps": selection.rejected_policy_logps[positions],
            "source": np.full(len(pairs), "generated"),
        }
        return _table(columns)


def generated_pairs(
    selection: Selection, positions: Ints, fetched: FetchedResponses, prompts: pa.Table
) -> GeneratedPairs:
    """Join pairs with their prompts.

    Args:
        selection: the best and worst responses.
        positions: of the pairs in it, ascending, all of them fetched.
        fetched: their responses.
        prompts: PROMPTS.

    Raises:
        PairError: a prompt is missing.
    """
    table = conform(prompts, PROMPTS, "prompts")
    prompt_id = selection.prompt_id.take(pa.array(positions))
    rows = pc.index_in(prompt_id, value_set=table["prompt_id"])
    if rows.null_count:
        first = prompt_id.filter(rows.is_null())[0]
        raise PairError(
            f"pair: {rows.null_count} of {len(prompt_id)} selected prompts are not in the prompts, the first is "
            f"prompt_id {first}: give the data set that the responses were generated from"
        )
    return GeneratedPairs(selection, positions, fetched, table["prompt"], rows.to_numpy().astype(np.int64))


def _table(columns: dict[str, object]) -> pa.Table:
    arrays = [
        column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column, field.type)
        for field, column in ((field, columns[field.name]) for field in _UNSPLIT)
    ]
    return pa.Table.from_arrays(arrays, schema=_UNSPLIT)

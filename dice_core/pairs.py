"""The training pairs of an iteration: selected responses joined with their texts, mixed with replayed offline pairs.

`selection.py` picks the responses, `length_penalty.py` the penalty and `replay.py` the counts; their names that a stage
needs are importable from here. Texts are read only for the pairs that may be used, part by part, so the responses of a
run never are in memory together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dice_core.config import PairingConfig
from dice_core.length_penalty import LengthPenalty, choose_length_penalty
from dice_core.records import PAIRS, PREFERENCES, PROMPTS, RESPONSES, conform
from dice_core.replay import draw_replayed, eval_mask, mix_counts, shuffled
from dice_core.selection import PairError, ScoredPrompts, Selection, group_scores, select_pairs

__all__ = [
    "LengthPenalty",
    "PairError",
    "PairSet",
    "ScoredPrompts",
    "Selection",
    "Tokenise",
    "build_pairs",
    "choose_length_penalty",
    "group_scores",
    "mix_counts",
    "offline_pairs",
    "select_pairs",
]

Ints = NDArray[np.int64]
Tokenise = Callable[[str], Sequence[int]]

_PART_ROWS = 65_536
_NEEDED_RESPONSES = pa.schema(
    [RESPONSES.field(n) for n in ("prompt_id", "sample_index", "prompt_token_ids", "response_token_ids", "response")]
)
_FETCHED = pa.schema([RESPONSES.field(n) for n in ("prompt_token_ids", "response_token_ids", "response")])
# PAIRS without the split, which is drawn when all pairs are together.
_UNSPLIT = pa.schema([field for field in PAIRS if field.name != "split"])


class PairSet(NamedTuple):
    """The pairs of an iteration.

    Attributes:
        pairs: a PAIRS table sorted by prompt_id, which is a digest: generated and replayed pairs are well mixed.
        counts: num_generated_pairs, num_replayed_pairs, num_train_pairs, num_eval_pairs; dropped because both texts are
            the same, among those looked at: num_identical_pairs, num_identical_offline_pairs;
            num_unused_generated_pairs, selected but more than the replay ratio has room for (their texts were not all
            looked at); num_missing_replayed_pairs, by which replay fell short of its share; and the counts of the
            selection.
    """

    pairs: pa.Table
    counts: dict[str, int]


def build_pairs(
    selection: Selection,
    responses: pa.Table | Iterable[pa.Table],
    preferences: pa.Table,
    *,
    prompts: pa.Table,
    config: PairingConfig,
    seed: int,
    tokenise_prompt: Tokenise,
    tokenise_response: Tokenise,
) -> PairSet:
    """Build the training pairs of an iteration.

    The reference log-probs of a generated pair are its policy log-probs from scoring: the policy that wrote and scored
    the responses is where training starts, hence its reference. Those of replayed pairs are null, for training to
    compute. The same inputs give the same pairs whatever the order of the rows of any table.

    Args:
        selection: the best and worst responses.
        responses: RESPONSES tables that hold every selected response, in any order.
        preferences: PREFERENCES, the offline pairs.
        prompts: PROMPTS with the text of every selected prompt.
        config: replay_ratio and num_eval_pairs are read.
        seed: of all draws.
        tokenise_prompt: prompt text to token ids, for replayed pairs. Generated ones keep the ids they were made from.
        tokenise_response: response text to token ids with the end of turn, for replayed pairs.

    Raises:
        PairError: a selected response or prompt is missing, or no pair is left.
        RecordError: a table without its columns.
    """
    offline, num_identical_offline = _distinct_preferences(preferences)
    if config.replay_ratio > 0 and not offline.num_rows:
        raise PairError(
            f"pair: pairing.replay_ratio {config.replay_ratio} needs offline preference pairs and there are none: give "
            f"preference pairs, or set pairing.replay_ratio to 0"
        )
    wanted, _ = mix_counts(offline.num_rows, len(selection.prompt_id), config.replay_ratio)
    candidates = _candidates(selection, wanted, seed)
    fetched = _fetch(selection, candidates, responses)
    differ = np.flatnonzero(pc.not_equal(fetched["chosen"]["response"], fetched["rejected"]["response"]).to_numpy())
    num_generated, num_replayed = mix_counts(offline.num_rows, len(differ), config.replay_ratio)
    kept = differ[:num_generated]
    generated = _generated(selection, candidates[kept], {side: t.take(kept) for side, t in fetched.items()}, prompts)
    is_taken = pc.is_in(offline["prompt_id"], value_set=generated["prompt_id"].combine_chunks()).to_numpy()
    drawn = draw_replayed(is_taken, num_replayed, seed)
    replayed = _replayed(offline.take(drawn), tokenise_prompt, tokenise_response)
    counts = {
        "num_identical_pairs": len(candidates) - len(differ),
        "num_identical_offline_pairs": num_identical_offline,
        "num_unused_generated_pairs": len(selection.prompt_id) - (len(candidates) - len(differ)) - len(kept),
        "num_missing_replayed_pairs": num_replayed - len(drawn),
        **selection.counts,
    }
    at_hand = (
        f"{offline.num_rows} offline and {len(differ)} generated pairs at pairing.replay_ratio {config.replay_ratio}"
    )
    return _split(generated, replayed, counts, at_hand, config, seed)


def offline_pairs(
    preferences: pa.Table,
    *,
    config: PairingConfig,
    seed: int,
    tokenise_prompt: Tokenise,
    tokenise_response: Tokenise,
) -> PairSet:
    """Make training pairs of all offline pairs and nothing else: the warm start from an SFT model.

    Args:
        preferences: PREFERENCES.
        config: num_eval_pairs is read.
        seed: of the evaluation split.
        tokenise_prompt: as for `build_pairs`.
        tokenise_response: as for `build_pairs`.

    Raises:
        PairError: there is no pair with two different texts.
        RecordError: a column is missing.
    """
    offline, num_identical = _distinct_preferences(preferences)
    replayed = _replayed(offline, tokenise_prompt, tokenise_response)
    counts = {
        "num_identical_pairs": 0,
        "num_identical_offline_pairs": num_identical,
        "num_unused_generated_pairs": 0,
        "num_missing_replayed_pairs": 0,
    }
    return _split(_UNSPLIT.empty_table(), replayed, counts, f"{offline.num_rows} offline pairs", config, seed)


def _distinct_preferences(preferences: pa.Table) -> tuple[pa.Table, int]:
    """Return the offline pairs with two different texts, in an order of their own, and how many had one."""
    table = conform(preferences, PREFERENCES, "preferences")
    distinct = table.filter(pc.not_equal(table["chosen"], table["rejected"]))
    ordered = distinct.sort_by([(name, "ascending") for name in ("prompt_id", "chosen", "rejected")])
    return ordered, table.num_rows - distinct.num_rows


def _candidates(selection: Selection, wanted: int, seed: int) -> Ints:
    """Return positions in the selection, in random order, of which `wanted` surely have two different texts.

    Different lengths are different texts; only equal lengths have to be read to know.
    """
    order = shuffled(len(selection.prompt_id), seed, "generated")
    surely = np.cumsum(selection.chosen_length[order] != selection.rejected_length[order])
    return order[: int(np.searchsorted(surely, wanted)) + 1] if wanted else order[:0]


def _parts(responses: pa.Table | Iterable[pa.Table]) -> Iterator[pa.Table]:
    if not isinstance(responses, pa.Table):
        yield from responses
        return
    for batch in responses.to_batches(max_chunksize=_PART_ROWS):
        yield pa.Table.from_batches([batch])


def _fetch(selection: Selection, candidates: Ints, responses: pa.Table | Iterable[pa.Table]) -> dict[str, pa.Table]:
    """Return the `chosen` and the `rejected` responses of the candidates, in the candidates' order."""
    ids = selection.prompt_id.take(pa.array(candidates)).to_pylist()
    places = {prompt_id: place for place, prompt_id in enumerate(ids)}
    indices = {"chosen": selection.chosen_index[candidates], "rejected": selection.rejected_index[candidates]}
    tables: dict[str, list[pa.Table]] = {side: [_FETCHED.empty_table()] for side in indices}
    found: dict[str, list[Ints]] = {side: [np.empty(0, dtype=np.int64)] for side in indices}
    for part in _parts(responses) if len(ids) else ():
        part = conform(part, _NEEDED_RESPONSES, "responses")
        rows, place = _known_rows(part["prompt_id"], places)
        sample_index = part["sample_index"].to_numpy()[rows]
        for side, wanted in indices.items():
            hits = np.flatnonzero(wanted[place] == sample_index)
            tables[side].append(part.select(_FETCHED.names).take(rows[hits]))
            found[side].append(place[hits])
    return {side: _in_order(pa.concat_tables(tables[side]), np.concatenate(found[side]), ids) for side in indices}


def _known_rows(prompt_ids: pa.ChunkedArray, places: dict[str, int]) -> tuple[Ints, Ints]:
    """Return the rows whose prompt has a place, and those places. A dictionary lookup per prompt, not per row."""
    encoded = pa.chunked_array([prompt_ids.combine_chunks()]).chunk(0).dictionary_encode()
    place_of_code = np.array([places.get(text, -1) for text in encoded.dictionary.to_pylist()], dtype=np.int64)
    place = place_of_code[encoded.indices.to_numpy()]
    rows = np.flatnonzero(place >= 0)
    return rows, place[rows]


def _in_order(table: pa.Table, places: Ints, ids: list[str]) -> pa.Table:
    times = np.bincount(places, minlength=len(ids))
    wrong = np.flatnonzero(times != 1)
    if len(wrong):
        fault = "missing from the responses" if times[wrong[0]] == 0 else "in the responses more than once"
        raise PairError(
            f"pair: {len(wrong)} of {len(ids)} selected responses are not there exactly once, the first, of prompt_id "
            f"{ids[wrong[0]]}, is {fault}: give the very responses that were scored, each shard once"
        )
    return table.take(np.argsort(places))


def _generated(selection: Selection, positions: Ints, fetched: dict[str, pa.Table], prompts: pa.Table) -> pa.Table:
    prompt_id = selection.prompt_id.take(pa.array(positions))
    chosen, rejected = fetched["chosen"], fetched["rejected"]
    columns = {
        "prompt_id": prompt_id,
        "prompt": _prompt_texts(prompt_id, prompts),
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "prompt_token_ids": chosen["prompt_token_ids"],
        "chosen_token_ids": chosen["response_token_ids"],
        "rejected_token_ids": rejected["response_token_ids"],
        "chosen_reward": selection.chosen_reward[positions],
        "rejected_reward": selection.rejected_reward[positions],
        "chosen_reference_logps": selection.chosen_policy_logps[positions],
        "rejected_reference_logps": selection.rejected_policy_logps[positions],
        "source": np.full(len(positions), "generated"),
    }
    return _table(columns)


def _prompt_texts(prompt_id: pa.Array, prompts: pa.Table) -> pa.ChunkedArray:
    table = conform(prompts, PROMPTS, "prompts")
    place = pc.index_in(prompt_id, value_set=table["prompt_id"])
    if place.null_count:
        first = prompt_id.filter(place.is_null())[0]
        raise PairError(
            f"pair: {place.null_count} of {len(prompt_id)} selected prompts are not in the prompts, the first is "
            f"prompt_id {first}: give the data set that the responses were generated from"
        )
    return table["prompt"].take(place)


def _replayed(offline: pa.Table, tokenise_prompt: Tokenise, tokenise_response: Tokenise) -> pa.Table:
    unknown = pa.nulls(offline.num_rows, pa.float64())
    columns = {
        **{name: offline[name] for name in PREFERENCES.names},
        "prompt_token_ids": [list(tokenise_prompt(text)) for text in offline["prompt"].to_pylist()],
        "chosen_token_ids": [list(tokenise_response(text)) for text in offline["chosen"].to_pylist()],
        "rejected_token_ids": [list(tokenise_response(text)) for text in offline["rejected"].to_pylist()],
        "chosen_reward": unknown,
        "rejected_reward": unknown,
        "chosen_reference_logps": unknown,
        "rejected_reference_logps": unknown,
        "source": np.full(offline.num_rows, "replayed"),
    }
    return _table(columns)


def _table(columns: dict[str, object]) -> pa.Table:
    arrays = [
        column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column, field.type)
        for field, column in ((field, columns[field.name]) for field in _UNSPLIT)
    ]
    return pa.Table.from_arrays(arrays, schema=_UNSPLIT)


def _split(
    generated: pa.Table, replayed: pa.Table, counts: dict[str, int], at_hand: str, config: PairingConfig, seed: int
) -> PairSet:
    """Put both kinds of pairs together by prompt_id and draw the evaluation split."""
    table = pa.concat_tables([generated, replayed])
    if not table.num_rows:
        raise PairError(
            f"pair: no pair is left to train on, of {at_hand} (pairs of identical texts not counted): give more pairs"
        )
    # A stable sort: several offline pairs of one prompt keep the order that _distinct_preferences gave them.
    owner = pc.rank(table["prompt_id"], sort_keys="ascending", tiebreaker="dense").to_numpy() - 1
    order = np.argsort(owner, kind="stable")
    table = table.take(order)
    is_eval = eval_mask(owner[order], config.num_eval_pairs, seed)
    pairs = table.append_column(PAIRS.field("split"), pa.array(np.where(is_eval, "eval", "train")))
    return PairSet(
        pairs,
        {
            "num_generated_pairs": generated.num_rows,
            "num_replayed_pairs": replayed.num_rows,
            "num_train_pairs": int((~is_eval).sum()),
            "num_eval_pairs": int(is_eval.sum()),
            **counts,
        },
    )

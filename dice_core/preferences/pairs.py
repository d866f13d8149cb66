"""The training pairs of an iteration: selected responses joined with their texts, mixed with replayed offline pairs.

`selection.py` picks the responses and `replay.py` the counts. `pair_rows.py` makes the rows: texts are read only for
the pairs that may be used, part by part, and go through a file to the order of their prompts, so neither the responses
of a run nor its pairs are in memory together.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dice_core.data.records import PAIRS
from dice_core.data.same_tokens import Tokenise
from dice_core.preferences.pair_rows import (
    GeneratedPairs,
    ReplayedPairs,
    fetch_responses,
    generated_pairs,
    read_offline,
)
from dice_core.preferences.replay import draw_replayed, eval_mask, mix_counts, shuffled
from dice_core.preferences.selection import PairError, Selection
from dice_core.preferences.settings import PairingConfig
from dice_core.preferences.spill import BUCKET_ROWS

Ints = NDArray[np.int64]


class PairSet(NamedTuple):
    """The pairs of an iteration.

    Attributes:
        tables: PAIRS, some thousand rows each, made one after another while the folder is there; sorted by prompt_id,
            which is a digest: generated and replayed pairs are well mixed.
        counts: num_generated_pairs, num_replayed_pairs, num_train_pairs, num_eval_pairs; dropped because both
            are the same text or the same token ids, among those looked at: num_identical_pairs,
            num_identical_offline_pairs;
            num_unused_generated_pairs, selected but more than the replay ratio has room for (their texts were not all
            looked at); num_missing_replayed_pairs, by which replay fell short of its share; and the counts of the
            selection.
    """

    tables: Iterator[pa.Table]
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
    folder: Path,
    bucket_rows: int = BUCKET_ROWS,
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
        folder: for files of the selected responses, about as large as what comes out.
        bucket_rows: pairs of one table, and responses that lie together in the files.

    Raises:
        PairError: a selected response or prompt is missing, or no pair is left.
        RecordError: a table without its columns.
    """
    offline, num_identical_offline = read_offline(preferences, tokenise_prompt, tokenise_response)
    num_offline = len(offline.rows)
    if config.replay_ratio > 0 and not num_offline:
        raise PairError(
            f"pair: pairing.replay_ratio {config.replay_ratio} needs offline preference pairs and there are none: give "
            f"preference pairs, or set pairing.replay_ratio to 0"
        )
    wanted, _ = mix_counts(num_offline, len(selection.prompt_id), config.replay_ratio)
    candidates = _candidates(selection, wanted, seed)
    fetched = fetch_responses(selection, candidates, responses, folder, bucket_rows)
    differ = candidates[fetched.differ[np.searchsorted(fetched.positions, candidates)]]
    num_generated, num_replayed = mix_counts(num_offline, len(differ), config.replay_ratio)
    generated = generated_pairs(selection, np.sort(differ[:num_generated]), fetched, prompts)
    is_taken = pc.is_in(offline.prompt_ids, value_set=generated.prompt_ids).to_numpy(zero_copy_only=False)
    drawn = draw_replayed(is_taken, num_replayed, seed)
    num_identical = len(candidates) - len(differ)
    counts = {
        "num_identical_pairs": num_identical,
        "num_identical_offline_pairs": num_identical_offline,
        "num_unused_generated_pairs": len(selection.prompt_id) - num_identical - len(generated.positions),
        "num_missing_replayed_pairs": num_replayed - len(drawn),
        **selection.counts,
    }
    at_hand = f"{num_offline} offline and {len(differ)} generated pairs at pairing.replay_ratio {config.replay_ratio}"
    return _mixed(generated, replace(offline, rows=offline.rows[drawn]), counts, at_hand, config, seed, bucket_rows)


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
    offline, num_identical = read_offline(preferences, tokenise_prompt, tokenise_response)
    counts = {
        "num_identical_pairs": 0,
        "num_identical_offline_pairs": num_identical,
        "num_unused_generated_pairs": 0,
        "num_missing_replayed_pairs": 0,
    }
    return _mixed(None, offline, counts, f"{len(offline.rows)} offline pairs", config, seed)


def _candidates(selection: Selection, wanted: int, seed: int) -> Ints:
    """Return positions in the selection, in random order, of which `wanted` surely have two different texts.

    Different lengths are different texts; only equal lengths have to be read to know.
    """
    order = shuffled(len(selection.prompt_id), seed, "generated")
    surely = np.cumsum(selection.chosen_length[order] != selection.rejected_length[order])
    return order[: int(np.searchsorted(surely, wanted)) + 1] if wanted else order[:0]


def _mixed(
    generated: GeneratedPairs | None,
    replayed: ReplayedPairs,
    counts: dict[str, int],
    at_hand: str,
    config: PairingConfig,
    seed: int,
    bucket_rows: int = BUCKET_ROWS,
) -> PairSet:
    """Put both kinds of pairs together by prompt_id and draw the evaluation split."""
    sources: list[GeneratedPairs | ReplayedPairs] = [replayed] if generated is None else [generated, replayed]
    prompt_ids = pa.concat_arrays([source.prompt_ids for source in sources])
    if not len(prompt_ids):
        raise PairError(
            f"pair: no pair is left to train on, of {at_hand} (pairs of identical texts not counted): give more pairs"
        )
    # A stable sort: several offline pairs of one prompt keep the order that read_offline gave them.
    owner = pc.rank(prompt_ids, sort_keys="ascending", tiebreaker="dense").to_numpy() - 1
    order = np.argsort(owner, kind="stable")
    is_eval = eval_mask(owner[order], config.num_eval_pairs, seed)
    return PairSet(
        _tables(sources, order, is_eval, bucket_rows),
        {
            "num_generated_pairs": len(prompt_ids) - len(replayed.rows),
            "num_replayed_pairs": len(replayed.rows),
            "num_train_pairs": int((~is_eval).sum()),
            "num_eval_pairs": int(is_eval.sum()),
            **counts,
        },
    )


def _tables(
    sources: Sequence[GeneratedPairs | ReplayedPairs], order: Ints, is_eval: NDArray[np.bool_], num_rows: int
) -> Iterator[pa.Table]:
    """Make the pairs piece by piece; the order counts those of the sources one after another."""
    starts = np.cumsum([0, *(len(source.prompt_ids) for source in sources[:-1])])
    for first in range(0, len(order), num_rows):
        piece = slice(first, first + num_rows)
        owners = np.searchsorted(starts, order[piece], side="right") - 1
        tables = [source.table(order[piece][owners == i] - starts[i]) for i, source in enumerate(sources)]
        places = np.argsort(np.argsort(owners, kind="stable"))
        split = pa.array(np.where(is_eval[piece], "eval", "train"))
        yield pa.concat_tables(tables).take(pa.array(places)).append_column(PAIRS.field("split"), split)

"""Scored responses grouped by prompt, and the chosen and the rejected one of each prompt.

Works on the numbers of SCORES tables alone. `pair_rules.py` has the rules of selection, `length_penalty.py` chooses the
penalty, `pairs.py` joins the texts.

Rows are sorted once by (prompt_id, sample_index), so the order of the input changes nothing, and laid out as dense
matrices of one prompt a row. argmax and argmin take the first of equal values: ties go to the lowest sample_index,
where upstream leaves them to an unstable sort.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dice_core.data.records import SCORES, conform
from dice_core.preferences.pair_rules import best_and_two_deviations_below, best_and_worst, largest_margins
from dice_core.preferences.reward import implicit_reward, length_regularised_reward
from dice_core.preferences.settings import PairingConfig

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rule = Literal["best-worst", "mu-2sigma", "margin"]

# Cells of one matrix. Its temporaries (a few times 8 bytes a cell) stay near the processor's cache: measured faster
# than one matrix for all prompts, and it bounds memory.
_BLOCK_CELLS = 1 << 18

# A best and a worst. How many responses make a prompt worth scoring is scoring.min_valid_responses.
_MIN_RESPONSES = 2


class PairError(ValueError):
    """No pairs can be made of this input. The message is one line."""


@dataclass(frozen=True)
class Block:
    """Prompts of like group size, one a row; short rows repeat their first response, which wins no tie against itself.

    Attributes:
        prompts: [prompts] positions in `ScoredPrompts.prompt_ids`.
        starts: [prompts] row of the first response in the flat arrays of `ScoredPrompts`.
        sizes: [prompts] how many responses each has.
        rewards: [prompts, responses] rewards without penalty; of the implicit one in nats, without beta.
        lengths: [prompts, responses] float64 holding whole numbers.
    """

    prompts: Ints
    starts: Ints
    sizes: Ints
    rewards: Floats
    lengths: Floats

    def chosen_and_rejected(self, length_penalty: float, rule: Rule) -> "Columns":
        """Return the pair of each prompt by its length-regularised rewards."""
        values = length_regularised_reward(self.rewards, self.lengths, length_penalty)
        if rule == "mu-2sigma":
            chosen, rejected = best_and_two_deviations_below(values, self.sizes)
        else:
            chosen, rejected = best_and_worst(values)
        return Columns(self, values, chosen, rejected)


class Columns(NamedTuple):
    """The pairs of a block at some length penalty: columns of its matrices. chosen, rejected: [prompts]."""

    block: Block
    values: Floats
    chosen: Ints
    rejected: Ints

    def gaps(self) -> Floats:
        """Return length(chosen) - length(rejected). Shape: [prompts]."""
        return self._differences(self.block.lengths)

    def margins(self) -> Floats:
        """Return what the length-regularised rewards differ by. Shape: [prompts]."""
        return self._differences(self.values)

    def num_tied(self) -> int:
        """Return how many prompts have no pair: chosen and rejected are one response."""
        return int((self.chosen == self.rejected).sum())

    def _differences(self, matrix: Floats) -> Floats:
        rows = np.arange(len(self.chosen))
        return np.asarray(matrix[rows, self.chosen] - matrix[rows, self.rejected])


@dataclass(frozen=True)
class ScoredPrompts:
    """The prompts with enough scored responses, sorted by prompt_id.

    Attributes:
        prompt_ids: [prompts] the ids, ascending.
        sample_index, reward, policy_logps, length: [rows], sorted by (prompt_id, sample_index); they also hold the rows
            of prompts with too few responses, which no block refers to.
        blocks: the prompts as matrices; every prompt is in one.
        counts: num_scores, num_non_finite_scores (rows dropped), num_few_responses_prompts (prompts dropped).
        rule: which two responses make a pair.
        share: of the prompts that keep their pairs, those of the largest margins; 1 with all rules but `margin`.
        is_implicit: whether the rewards are implicit ones, and not those of column `reward`.
    """

    prompt_ids: pa.Array
    sample_index: NDArray[np.int32]
    reward: Floats
    policy_logps: Floats
    length: NDArray[np.int32]
    blocks: tuple[Block, ...]
    counts: dict[str, int]
    rule: Rule = "best-worst"
    share: float = 1.0
    is_implicit: bool = True

    @property
    def has_envelopes(self) -> bool:
        """Return whether every prompt has a pair, the ends of its envelopes: best-worst of all prompts."""
        return self.rule != "mu-2sigma" and self.share == 1

    def pairs(self, length_penalty: float) -> Iterator[Columns]:
        """Yield the pairs of each block."""
        return (block.chosen_and_rejected(length_penalty, self.rule) for block in self.blocks)

    def measure(self, length_penalty: float) -> tuple[float, int]:
        """Return the mean length gap at a penalty, see `mean_length_gap`, and how many prompts tie there."""
        if self.share == 1:
            gap = num_tied = 0
            for pairs in self.pairs(length_penalty):
                gap += int(pairs.gaps().sum())
                num_tied += pairs.num_tied()
            return gap / len(self.prompt_ids), num_tied
        margins, gaps = (np.empty(len(self.prompt_ids)) for _ in range(2))
        for pairs in self.pairs(length_penalty):
            margins[pairs.block.prompts], gaps[pairs.block.prompts] = pairs.margins(), pairs.gaps()
        kept = largest_margins(margins, self.share)
        return float(gaps[kept].mean()), int((margins[kept] == 0).sum())

    def num_tied(self, length_penalty: float) -> int:
        """Return how many prompts have no pair: chosen and rejected are one response."""
        return self.measure(length_penalty)[1]

    def mean_length_gap(self, length_penalty: float) -> float:
        """Return the mean of length(chosen) - length(rejected), signed; what upstream's sweep minimises.

        Over all prompts, tied ones with 0 among them, or over those that keep their pairs.
        """
        return self.measure(length_penalty)[0]


@dataclass(frozen=True)
class Selection:
    """The chosen and the rejected response of each prompt; every array is [pairs], sorted by prompt_id.

    Attributes:
        prompt_id: the prompts.
        chosen_index, rejected_index: their sample_index.
        chosen_reward, rejected_reward: without penalty; of the implicit reward in nats, without beta.
        chosen_policy_logps, rejected_policy_logps: log-probs under the policy that wrote them, nats.
        chosen_length, rejected_length: in the unit of `PairingConfig.length_unit`.
        counts: those of `ScoredPrompts`, num_small_margin_prompts (dropped by rule `margin`), and num_tied_prompts
            (dropped, of the others: chosen and rejected are one response).
    """

    prompt_id: pa.Array
    chosen_index: NDArray[np.int32]
    rejected_index: NDArray[np.int32]
    chosen_reward: Floats
    rejected_reward: Floats
    chosen_policy_logps: Floats
    rejected_policy_logps: Floats
    chosen_length: NDArray[np.int32]
    rejected_length: NDArray[np.int32]
    counts: dict[str, int]


def group_scores(scores: pa.Table | Iterable[pa.Table], config: PairingConfig) -> ScoredPrompts:
    """Group scored responses by prompt; drop rows without a finite reward and prompts with fewer than two responses.

    Args:
        scores: one SCORES table or several; given as an iterable, only the numbers of each are kept.
        config: length_unit, selection and margin_share are read.

    Raises:
        PairError: fewer than two prompts have two responses, or a response was scored twice.
        RecordError: a table without the columns of SCORES.
    """
    codes, prompt_ids, numbers, is_implicit = _read_columns(scores, config)
    num_scores = len(codes)
    finite = np.isfinite(numbers["reward"])
    # One integer a row that sorts as (prompt_id, sample_index): much faster than a two-column sort.
    key = (codes[finite].astype(np.int64) << 32) + (numbers["sample_index"][finite].astype(np.int64) + 2**31)
    order = np.argsort(key)
    key = key[order]
    _refuse_duplicates(key, prompt_ids)
    owner = key >> 32
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    sizes = np.diff(starts, append=len(owner))
    owners = owner[starts]
    del key, owner
    rows = np.flatnonzero(finite)[order]
    del order
    flat = {name: column[rows] for name, column in numbers.items()}
    enough = sizes >= _MIN_RESPONSES
    if enough.sum() < 2:
        raise PairError(_too_few(len(prompt_ids), int(enough.sum()), sizes, num_scores))
    blocks = tuple(_blocks(starts[enough], sizes[enough], flat["reward"], flat["length"]))
    counts = {
        "num_scores": num_scores,
        "num_non_finite_scores": num_scores - len(rows),
        "num_few_responses_prompts": len(prompt_ids) - int(enough.sum()),
    }
    return ScoredPrompts(
        prompt_ids=prompt_ids.take(pa.array(owners[enough])),
        blocks=blocks,
        counts=counts,
        rule=config.selection,
        share=config.margin_share if config.selection == "margin" else 1.0,
        is_implicit=is_implicit,
        **flat,
    )


def select_pairs(
    scores: ScoredPrompts | pa.Table | Iterable[pa.Table], length_penalty: float, config: PairingConfig
) -> Selection:
    """Select the pair of each prompt by reward - length_penalty * length.

    A prompt without two responses to tell apart has no pair: it is dropped and counted.

    Args:
        scores: SCORES tables, or `group_scores` of them where the caller has that already.
        length_penalty: unit of the reward per unit of length, see `choose_length_penalty`.
        config: as for `group_scores`.

    Raises:
        PairError: as `group_scores`, or no prompt has a pair.
    """
    grouped = scores if isinstance(scores, ScoredPrompts) else group_scores(scores, config)
    chosen, rejected = (np.empty(len(grouped.prompt_ids), dtype=np.int64) for _ in range(2))
    margins = np.empty(len(chosen))
    for pairs in grouped.pairs(length_penalty):
        block = pairs.block
        chosen[block.prompts], rejected[block.prompts] = block.starts + pairs.chosen, block.starts + pairs.rejected
        margins[block.prompts] = pairs.margins()
    kept = np.flatnonzero(largest_margins(margins, grouped.share))
    differ = kept[chosen[kept] != rejected[kept]]
    if not len(differ):
        raise PairError(
            f"pair: in each of {len(kept)} prompts all responses have the same length-regularised reward, so none is "
            f"best or worst: are the policy and the reference the same model?"
        )
    chosen, rejected = chosen[differ], rejected[differ]
    return Selection(
        prompt_id=grouped.prompt_ids.take(pa.array(differ)),
        chosen_index=grouped.sample_index[chosen],
        rejected_index=grouped.sample_index[rejected],
        chosen_reward=grouped.reward[chosen],
        rejected_reward=grouped.reward[rejected],
        chosen_policy_logps=grouped.policy_logps[chosen],
        rejected_policy_logps=grouped.policy_logps[rejected],
        chosen_length=grouped.length[chosen],
        rejected_length=grouped.length[rejected],
        counts=grouped.counts
        | {"num_small_margin_prompts": len(margins) - len(kept), "num_tied_prompts": len(kept) - len(differ)},
    )


def _read_columns(
    scores: pa.Table | Iterable[pa.Table], config: PairingConfig
) -> tuple[NDArray[np.int32], pa.Array, dict[str, NDArray[Any]], bool]:
    """Return each row's rank of its prompt_id [rows], the sorted ids, the number columns [rows], and whose rewards.

    The last is True where they are the implicit ones, and False where the tables bring their own.
    """
    length = {"characters": "num_chars", "tokens": "num_tokens"}[config.length_unit]
    columns = ["prompt_id", "sample_index", "policy_logps", "reference_logps", length, "reward"]
    parts = []
    for part in [scores] if isinstance(scores, pa.Table) else scores:
        part = conform(part, pa.schema([SCORES.field(name) for name in columns]), "scores")
        # 4 bytes a row in place of a string: what lets a million prompts fit.
        encoded = part["prompt_id"].dictionary_encode()
        parts.append(part.set_column(0, pa.field("prompt_id", encoded.type, False), encoded))
    if not parts:
        raise PairError("pair: no score table was given")
    table = pa.concat_tables(parts).unify_dictionaries()
    if not table.num_rows:
        raise PairError("pair: the score tables are empty: no response was scored")
    chunks = [chunk for chunk in table["prompt_id"].chunks if len(chunk)]
    ids = chunks[0].dictionary
    order = pc.array_sort_indices(ids)
    rank = np.empty(len(ids), dtype=np.int32)
    rank[order.to_numpy()] = np.arange(len(ids), dtype=np.int32)
    codes = np.concatenate([rank[chunk.indices.to_numpy()] for chunk in chunks])
    numbers = {name: table[name].to_numpy() for name in columns[1:]}
    numbers["length"] = numbers.pop(length)
    is_implicit = _has_implicit_rewards(table["reward"])
    if is_implicit:
        numbers["reward"] = implicit_reward(numbers["policy_logps"], numbers["reference_logps"])
    del numbers["reference_logps"]
    return codes, ids.take(order), numbers, is_implicit


def _has_implicit_rewards(rewards: pa.ChunkedArray) -> bool:
    """Return whether no row has a reward of another kind; all or none may."""
    if 0 < rewards.null_count < len(rewards):
        raise PairError(
            f"pair: {rewards.null_count} of {len(rewards)} scores have no value in column 'reward' and the others have "
            "one, and two kinds of rewards cannot be compared: give scores that were made with one scoring.reward"
        )
    return bool(rewards.null_count)


def _refuse_duplicates(key: Ints, prompt_ids: pa.Array) -> None:
    repeated = np.flatnonzero(key[1:] == key[:-1])
    if len(repeated):
        first = int(key[repeated[0]])
        raise PairError(
            f"pair: {len(repeated)} responses were scored twice, the first is prompt_id {prompt_ids[first >> 32]} "
            f"sample_index {(first & (2**32 - 1)) - 2**31}: give each score table once"
        )


def _too_few(num_prompts: int, num_enough: int, sizes: Ints, num_scores: int) -> str:
    return (
        f"pair: {num_enough} of {num_prompts} prompts have at least {_MIN_RESPONSES} responses with a finite score, "
        f"two prompts are needed; the most that one has is {sizes.max(initial=0)} ({num_scores} scores in all): "
        f"generate more responses per prompt, or lower scoring.min_valid_responses"
    )


def _blocks(starts: Ints, sizes: Ints, reward: Floats, length: NDArray[np.int32]) -> Iterator[Block]:
    """Cut prompts into matrices: sizes within one differ by less than a factor of two, so padding cannot explode."""
    size_class = np.frexp(sizes)[1]  # 8 to 15 responses are one class, 16 to 31 the next
    for one_class in np.unique(size_class):
        members = np.flatnonzero(size_class == one_class)
        width = int(sizes[members].max())
        columns = np.arange(width)
        step = max(1, _BLOCK_CELLS // width)
        for first in range(0, len(members), step):
            prompts = members[first : first + step]
            rows = starts[prompts, None] + np.where(columns < sizes[prompts, None], columns, 0)
            yield Block(prompts, starts[prompts], sizes[prompts], reward[rows], length[rows].astype(np.float64))

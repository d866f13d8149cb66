"""The pairs of a training run in memory, and the order in which they are trained on.

Reads no storage and loads no torch: what is wrong with the pairs is said before a model is loaded.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dice_core.data.records import RecordError

MIN_MEASURED, MAX_MEASURED = 16, 256


@dataclass(frozen=True)
class TrainingPair:
    """One preference pair as token ids (int32 arrays)."""

    index: int
    """Row of its reference log-probs."""
    prompt_id: str
    prompt_token_ids: npt.NDArray[np.int32]
    chosen_token_ids: npt.NDArray[np.int32]
    rejected_token_ids: npt.NDArray[np.int32]

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longer response: what max_length limits."""
        return len(self.prompt_token_ids) + max(len(self.chosen_token_ids), len(self.rejected_token_ids))

    @property
    def num_tokens(self) -> int:
        """Tokens a packed forward runs: the prompt once, and both responses."""
        return len(self.prompt_token_ids) + len(self.chosen_token_ids) + len(self.rejected_token_ids)


@dataclass(frozen=True)
class TrainingPairs:
    """What is trained on, what the loss is watched on, and the reference log-probs known beforehand."""

    train: list[TrainingPair]
    eval: list[TrainingPair]
    reference_logps: npt.NDArray[np.float64]
    """Nats, NaN where unknown. Shape: (train + eval pairs, 2), chosen first."""
    num_dropped: int
    """Pairs longer than max_length, of both splits."""
    num_identical: int = 0
    """Pairs whose two responses are the same token ids, of both splits: their loss is ln 2 whatever is learnt."""

    @property
    def all(self) -> list[TrainingPair]:
        """Both splits, in order of index."""
        return sorted(self.train + self.eval, key=lambda pair: pair.index)


def read_pairs(table: pa.Table, max_length: int, where: str, section: str = "training") -> TrainingPairs:
    """Turn a records.PAIRS table into training pairs.

    Args:
        table: the pairs, in any order.
        max_length: pairs whose prompt plus longer response has more tokens are dropped, as are pairs whose responses
            are the same token ids.
        where: what the table is called in messages.
        section: what max_length is a setting of.

    Raises:
        RecordError: a response without tokens, or no training pair is left.
    """
    columns = [_arrays(table[name]) for name in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")]
    split, prompt_ids = table["split"].to_pylist(), table["prompt_id"].to_pylist()
    kept: dict[str, list[TrainingPair]] = {"train": [], "eval": []}
    rows: list[int] = []
    shortest = num_identical = 0
    for row, tokens in enumerate(zip(*columns, strict=True)):
        if not all(len(ids) for ids in tokens):
            raise RecordError(f"{where}: the pair of prompt {prompt_ids[row]} has a prompt or a response of no tokens")
        if split[row] not in kept:
            raise RecordError(f"{where}: split must be 'train' or 'eval', got {split[row]!r}")
        pair = TrainingPair(len(rows), prompt_ids[row], *tokens)
        if np.array_equal(pair.chosen_token_ids, pair.rejected_token_ids):
            num_identical += 1
            continue
        if pair.length > max_length:
            shortest = min(shortest or pair.length, pair.length)
            continue
        kept[split[row]].append(pair)
        rows.append(row)
    if not kept["train"]:
        message = f"{where}: no training pair is left of {table.num_rows} pairs"
        if shortest:
            message += f" ({section}.max_length is {max_length}, the shortest dropped pair has {shortest} tokens)"
        if num_identical:
            message += f" ({num_identical} have two responses of the same token ids)"
        raise RecordError(message)
    num_too_long = table.num_rows - len(rows) - num_identical
    return TrainingPairs(kept["train"], kept["eval"], _known_logps(table, rows), num_too_long, num_identical)


def measured_pairs(train: Sequence[TrainingPair], num_trained: int) -> list[TrainingPair]:
    """Return the training pairs on which the model is measured before the first step and after the last.

    An eighth of those trained on, within MIN_MEASURED and MAX_MEASURED: two passes, forward only, then cost under a
    tenth of the training. Pair stages publish pairs in a random order, so the first ones are a fair sample.

    Args:
        train: the training pairs.
        num_trained: pairs that the run trains on, repeats included.
    """
    return list(train[: min(MAX_MEASURED, max(MIN_MEASURED, num_trained // 8))])


def step_order(lengths: Sequence[int], global_batch_size: int, num_steps: int, seed: int) -> list[int]:
    """Return which pair is trained on when: global_batch_size positions for each step, whatever the processes.

    Each pass over the data is a new permutation, and a step may span two passes, so every pair is used equally often.
    Within a step the pairs go from long to short.

    Args:
        lengths: tokens of each pair.
        global_batch_size: pairs of a step over all processes.
        num_steps: of the run.
        seed: decides the order alone.
    """
    rng = np.random.default_rng(seed)
    num_passes = -(-num_steps * global_batch_size // len(lengths))
    stream = np.concatenate([rng.permutation(len(lengths)) for _ in range(num_passes)])
    steps = stream[: num_steps * global_batch_size].reshape(num_steps, global_batch_size)
    longest_first = np.argsort(-np.asarray(lengths)[steps], axis=1, kind="stable")
    order: list[int] = np.take_along_axis(steps, longest_first, axis=1).ravel().tolist()
    return order


def packed_rows(order: Sequence[int], lengths: Sequence[int], batch_size: int, num_rows: int) -> list[list[int]]:
    """Return the pairs of each micro-batch: every step's pairs packed into rows of nearly equal numbers of tokens.

    The longest pair left goes to the row with the fewest tokens, so that processes which take a row each end together
    and no row is much larger than the mean. Rows of a step go from large to small. What a step averages over stays what
    `step_order` drew.

    Args:
        order: of `step_order`.
        lengths: tokens of each pair.
        batch_size: pairs of a step over all processes.
        num_rows: micro-batches of a step over all processes, at most batch_size.
    """
    rows: list[list[int]] = []
    for start in range(0, len(order), batch_size):
        step: list[list[int]] = [[] for _ in range(num_rows)]
        room = [(0, row) for row in range(num_rows)]
        for pair in order[start : start + batch_size]:
            num_tokens, row = heapq.heappop(room)
            step[row].append(pair)
            heapq.heappush(room, (num_tokens + lengths[pair], row))
        rows += [step[row] for _, row in sorted(room, key=lambda entry: (-entry[0], entry[1]))]
    return rows


def _arrays(column: pa.ChunkedArray) -> list[npt.NDArray[np.int32]]:
    """Return the lists of a column as views, without a Python object for each token."""
    arrays: list[npt.NDArray[np.int32]] = []
    for chunk in column.chunks:
        values, offsets = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        arrays += [values[start:end] for start, end in itertools.pairwise(offsets)]
    return arrays


def _known_logps(table: pa.Table, rows: list[int]) -> npt.NDArray[np.float64]:
    columns = [
        table[name].combine_chunks().to_numpy(zero_copy_only=False).astype(np.float64)
        for name in ("chosen_reference_logps", "rejected_reference_logps")
    ]
    return np.stack(columns, axis=1)[rows].reshape(len(rows), 2)

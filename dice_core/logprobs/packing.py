"""Prompt groups laid out as rows of tokens: a prompt once, then its responses; each sees the prompt and itself.

Positions restart after the prompt for every response. The keys a token sees are two ranges of its row, so masks of
every kind follow from a few arrays. No model is known here: `attention.py` makes masks of rows, `forward.py` runs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Ids = Sequence[int]
Ints = npt.NDArray[np.int64]


class PromptGroupError(ValueError):
    """A group whose log-probs are not defined. The message is one line."""


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and the responses to it, as token ids; a response includes its end-of-turn token, if it has one."""

    prompt_token_ids: Ids
    responses: Sequence[Ids]

    def __post_init__(self) -> None:
        if len(self.prompt_token_ids) == 0:
            raise PromptGroupError("a prompt has no tokens: nothing predicts the first token of its responses")


@dataclass(frozen=True)
class Piece:
    """Some responses of a group that go into one row. `indices` are their places in the group."""

    group: int
    indices: tuple[int, ...]
    content: PromptGroup

    @property
    def num_tokens(self) -> int:
        """Return the tokens the piece takes in a row."""
        return row_length(self.content)


@dataclass(frozen=True)
class Row:
    """One row of tokens. Arrays are int64 of shape (tokens,), the last two of shape (response tokens,).

    The token at place q sees the keys [own_starts[q], q] and [prompt_starts[q], prompt_ends[q]); the second range is
    empty for the tokens of a prompt.
    """

    input_ids: Ints
    positions: Ints
    own_starts: Ints
    prompt_starts: Ints
    prompt_ends: Ints
    predictors: Ints
    """The place whose output predicts each response token: a response's first is predicted by the prompt's last."""
    targets: Ints


def row_length(group: PromptGroup) -> int:
    """Return the tokens of a group in a row. The last token of a response predicts nothing: it is no input."""
    return len(group.prompt_token_ids) + sum(max(len(response) - 1, 0) for response in group.responses)


def pack_row(groups: Sequence[PromptGroup]) -> Row:
    """Lay groups out one after another in one row."""
    segments = []
    predictors: list[Ints] = []
    targets: list[Ints] = []
    end = 0
    for group in groups:
        prompt = np.asarray(group.prompt_token_ids, dtype=np.int64)  # (prompt tokens,)
        start, prompt_end = end, end + len(prompt)
        segments.append(_segment(prompt, 0, start, start, start))
        end = prompt_end
        for response in group.responses:
            tokens = np.asarray(response, dtype=np.int64)  # (response tokens,)
            inputs = tokens[:-1]
            segments.append(_segment(inputs, len(prompt), end, start, prompt_end))
            # The prompt's last token, then every token of the response but its last.
            predictors.append(np.concatenate([[prompt_end - 1], np.arange(end, end + len(inputs))])[: len(tokens)])
            targets.append(tokens)
            end += len(inputs)
    # Each (tokens,).
    ids, positions, own_starts, prompt_starts, prompt_ends = (_joined(parts) for parts in zip(*segments, strict=True))
    return Row(ids, positions, own_starts, prompt_starts, prompt_ends, _joined(predictors), _joined(targets))


def _segment(tokens: Ints, position: int, own_start: int, prompt_start: int, prompt_end: int) -> tuple[Ints, ...]:
    """Return the first five columns of Row for some tokens. Shape of each: (tokens,)."""
    own = np.full(len(tokens), own_start)
    return (
        tokens,
        position + np.arange(len(tokens)),
        own,
        np.full(len(tokens), prompt_start),
        np.full(len(tokens), prompt_end),
    )


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def windowed(row: Row, window: int) -> Row:
    """Return the row with keys at a distance of `window` positions or more out of sight.

    Distances count in positions: between a response and its prompt they do not depend on what lies between.
    """
    places = np.arange(len(row.positions))  # (tokens,)
    # In the prompt, the key at prompt_starts + p has position p.
    return replace(
        row,
        own_starts=np.maximum(row.own_starts, places - window + 1),
        prompt_starts=np.maximum(row.prompt_starts, row.prompt_starts + row.positions - window + 1),
    )


def padded(row: Row, length: int) -> Row:
    """Return the row filled up to a length with tokens that see themselves only and are seen by none."""
    num_missing = length - len(row.input_ids)
    zeros = np.zeros(num_missing, dtype=np.int64)
    fill = (zeros, zeros, np.arange(len(row.input_ids), length), zeros, zeros)
    names = ("input_ids", "positions", "own_starts", "prompt_starts", "prompt_ends")
    return replace(row, **{name: _joined([getattr(row, name), new]) for name, new in zip(names, fill, strict=True)})


def split_groups(groups: Sequence[PromptGroup], max_tokens: int) -> list[Piece]:
    """Cut groups that are longer than a row may be into pieces that each repeat the prompt.

    A piece has at least one response, however long that is.
    """
    pieces = []
    for number, group in enumerate(groups):
        taken: list[int] = []
        num_tokens = len(group.prompt_token_ids)
        for index, response in enumerate(group.responses):
            num_inputs = max(len(response) - 1, 0)
            if taken and num_tokens + num_inputs > max_tokens:
                pieces.append(_piece(number, group, taken))
                taken, num_tokens = [], len(group.prompt_token_ids)
            taken.append(index)
            num_tokens += num_inputs
        if taken:
            pieces.append(_piece(number, group, taken))
    return pieces


def _piece(number: int, group: PromptGroup, indices: Sequence[int]) -> Piece:
    content = PromptGroup(group.prompt_token_ids, [group.responses[index] for index in indices])
    return Piece(number, tuple(indices), content)


def fill_rows(pieces: Sequence[Piece], max_tokens: int) -> list[list[Piece]]:
    """Put pieces into few rows of at most so many tokens."""
    return [[pieces[i] for i in row] for row in fill_to([piece.num_tokens for piece in pieces], max_tokens)]


def fill_to(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put items into few rows of at most so many tokens: the longest first, each into the first row with room.

    Args:
        lengths: tokens of each item.
        max_tokens: of a row; an item that is longer has a row of its own.

    Returns:
        The indices of each row's items.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if fitting is None:
            rows.append([index])
            room.append(max_tokens - lengths[index])
        else:
            rows[fitting].append(index)
            room[fitting] -= lengths[index]
    return rows


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group the indices of sequences into batches of nearly equal lengths, the longest first.

    Args:
        lengths: of the sequences, in tokens.
        max_tokens: rows x longest row of a batch; a sequence longer than that is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches

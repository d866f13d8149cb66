"""One row of a user's source, in any form that is known, becomes plain texts. Pure.

What the form has beside the texts is used, or the row is dropped under a reason of its own: Alpaca's `input` is the
second half of the question, a `system` or a `history` makes it another conversation than the one this project aligns.
sources.py brings the rows and counts, preparing.py looks at the texts.
"""

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dice_core.data.records import RecordError
from dice_core.data.settings import DataConfig

PROMPT_COLUMNS = ("prompt", "instruction")
_ASK_SOMETHING_ELSE = ("history", "tools", "documents", "image", "images", "audio", "audios", "video", "videos")
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)
SIDE_COLUMNS = (
    *("input", "context", "system", "system_prompt"),
    *_ASK_SOMETHING_ELSE,
    *(name for names in _SCORES for name in names),
)
"""What decides, beside the texts, what a row asks and which answer is better. Read wherever a source has them."""

FINISH_REASON = "finish_reason"
_FINISHED = ("", "stop", "eos", "eos_token", "end_turn", "stop_sequence")
"""What engines and vendors say of a response that ended by itself."""

EMPTY = object()
"""Stands for a value without text in a source that nobody can correct: the row is dropped, not refused."""

_WRITTEN_EMPTY = ("[]", "{}", "nan", "<noinput>")
"""What stands for nothing where a list or a missing value was written as text."""
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*(['"])(role|content|from|value)\1\s*:""")
# "Hi!" is how an answer to "Hi!" begins, but nobody repeats a question, or a long prompt word for word.
_SURELY_REPEATED_CHARACTERS = 20
_LONGEST_LABEL = 40
# Parts of an assistant's message beside its content, and the reason a row that has one is counted under.
_BESIDE_CONTENT = {
    "tool_calls": "tools",
    "function_call": "tools",
    "reasoning_content": "reasoning",
    "reasoning": "reasoning",
    "thinking": "reasoning",
}
_ASKER = re.compile(r"[\W_]*(human|user|question|instruction|prompt|q)[*\s]*[:\n][\W_]*", re.IGNORECASE)
_ANSWERER = re.compile(r"[\W_]*(assistant|answer|response|output|gpt|bot|ai|a)[*\s]*:[*\s]*", re.IGNORECASE)


class UnusableRow(Exception):
    """A valid row that cannot become a prompt or a pair; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Texts:
    """What a row says."""

    texts: tuple[str, ...]
    """The prompt; of a pair also the chosen and the rejected answer."""
    cleaned: frozenset[str] = frozenset()
    """What was changed on the way, by reason."""


def prompt_row(row: Mapping[str, Any], where: str, config: DataConfig) -> Texts:
    """Read the prompt of a row.

    Args:
        row: column to value, as JSON or Arrow has them.
        where: file and line, for messages.
        config: what becomes of a system prompt.

    Raises:
        RecordError: the row has no usable text: one line with `where`.
        UnusableRow: it asks something else than one question.
    """
    reader = _Reader(row, where, config)
    if not any(name in row for name in PROMPT_COLUMNS):
        raise RecordError(f"{where}: has neither 'prompt' nor 'instruction', it has {_keys(row)}")
    return Texts((reader.question(),), frozenset(reader.cleaned))


def preference_row(row: Mapping[str, Any], where: str, config: DataConfig) -> Texts:
    """Read the prompt and the two answers of a row.

    Args:
        row: as for prompt_row.
        where: as for prompt_row.
        config: what becomes of a system prompt, and of a prompt that the answers repeat.

    Raises:
        RecordError: as for prompt_row.
        UnusableRow: it is no pair of answers to one question.
    """
    reader = _Reader(row, where, config)
    chosen_prompt, chosen = reader.answer("chosen")
    rejected_prompt, rejected = reader.answer("rejected")
    prompt = reader.question() if any(name in row for name in PROMPT_COLUMNS) else chosen_prompt
    if prompt is None:
        raise RecordError(f"{where}: 'prompt' is missing, it has {_keys(row)}")
    said = {text for text in (chosen_prompt, rejected_prompt) if text is not None}
    if any(text.strip() != prompt.strip() for text in said):
        # The pair compares answers to different questions, or to something other than the prompt.
        raise UnusableRow("prompts_differ")
    if any(_scores_less(row, *names) for names in _SCORES):
        raise UnusableRow("rejected_scores_more")
    answers = [reader.without_prompt(prompt, answer) for answer in (chosen, rejected)]
    return Texts((prompt, *answers), frozenset(reader.cleaned))


def response_rows(row: Mapping[str, Any], where: str, config: DataConfig) -> list[Texts]:
    """Read the prompt and the responses of a row: one text in `response`, or a list of texts in `responses`.

    A row that says in `finish_reason` that its response was cut off is dropped: it would get an end that it never had.

    Args:
        row: as for prompt_row.
        where: as for prompt_row.
        config: as for preference_row.

    Raises:
        RecordError: as for prompt_row.
        UnusableRow: as for preference_row.
    """
    reader = _Reader(row, where, config)
    if not any(name in row for name in PROMPT_COLUMNS):
        raise RecordError(f"{where}: has neither 'prompt' nor 'instruction', it has {_keys(row)}")
    prompt = reader.question()
    if str(row.get(FINISH_REASON) or "").lower() not in _FINISHED:
        raise UnusableRow("not_finished")
    if "responses" in row:
        values = row["responses"]
        if not isinstance(values, list) or not values:
            raise RecordError(f"{where}: 'responses' must be a list of texts, got {kind(values)}")
        answers = [_text(value, f"responses[{number}]", where) for number, value in enumerate(values)]
    else:
        asked, answer = reader.answer("response")
        if asked is not None and asked.strip() != prompt.strip():
            raise UnusableRow("prompts_differ")
        answers = [answer]
    texts = [(prompt, reader.without_prompt(prompt, answer)) for answer in answers]
    return [Texts(text, frozenset(reader.cleaned)) for text in texts]


def has_text(value: object) -> bool:
    """Return whether a text, a list of messages or a list of parts says anything."""
    if isinstance(value, list):
        # A system message without text is none at all.
        said = [part for part in value if isinstance(part, dict) and part.get("role") != "system"]
        return all(has_text(part.get("content", part.get("text", part))) for part in said)
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


class _Reader:
    """Reads the columns of one row, and notes what it changes."""

    def __init__(self, row: Mapping[str, Any], where: str, config: DataConfig) -> None:
        self.row, self.where, self.config = row, where, config
        self.cleaned: set[str] = set()

    def question(self) -> str:
        """Return the prompt, whole: with Alpaca's input. What asks something beside it drops the row."""
        for name in _ASK_SOMETHING_ELSE:
            if self._has(name):
                raise UnusableRow(name)
        if self._has("system") or self._has("system_prompt"):
            self._system_prompt("system_prompt")
        named = [name for name in PROMPT_COLUMNS if name in self.row]
        if len(named) == 2:
            named = [name for name in named if _says_something(self.row[name])] or named
        texts = [self._prompt_text(self.row[name], name) for name in named]
        if any(not _has_lines(texts[0], text) for text in texts[1:]):
            raise UnusableRow("prompts_differ")
        # Dolly's name for the input; elsewhere a context may be anything.
        inputs = ["input", "context"] if named == ["instruction"] else ["input"]
        return self._with_inputs(texts[0], inputs)

    def _has(self, name: str) -> bool:
        """Return whether a column beside the texts says anything."""
        value = self.row.get(name)
        return value not in _WRITTEN_EMPTY and _says_something(value)

    def answer(self, key: str) -> tuple[str | None, str]:
        """Return the question a list of messages begins with (None where there is none), and the answer."""
        if key not in self.row:
            raise RecordError(f"{self.where}: {key!r} is missing, it has {_keys(self.row)}")
        value = self._read_messages(self.row[key])
        if not isinstance(value, list):
            return None, _text(value, key, self.where)
        messages = self._turns(value, key)
        roles = [role for role, _ in messages]
        if roles not in (["user", "assistant"], ["assistant"]):
            raise UnusableRow("not_single_turn")
        return (messages[0][1] if len(messages) == 2 else None), messages[-1][1]

    def without_prompt(self, prompt: str, answer: str) -> str:
        """Return the answer alone, where it repeats the prompt in front of it."""
        rest = None if self.config.repeated_prompts == "keep" else after_prompt(prompt.strip(), answer)
        if rest is None:
            return answer
        if self.config.repeated_prompts == "drop":
            raise UnusableRow("repeated_prompt")
        if not rest.strip():
            raise UnusableRow("empty")
        self.cleaned.add("repeated_prompt")
        return rest.lstrip()

    def _prompt_text(self, value: object, key: str) -> str:
        value = self._read_messages(value)
        if isinstance(value, list):
            messages = self._turns(value, key)
            if [role for role, _ in messages] != ["user"]:
                raise UnusableRow("not_single_turn")
            return messages[0][1]
        return _text(value, key, self.where)

    def _with_inputs(self, prompt: str, names: Sequence[str]) -> str:
        for name in names:
            value = self.row.get(name)
            if not self._has(name):
                continue
            if not isinstance(value, str):
                raise UnusableRow(f"{name}_not_text")
            if not _has_lines(prompt, value):
                prompt = f"{prompt}\n{_text(value, name, self.where)}"
        return prompt

    def _read_messages(self, value: object) -> object:
        """Return the messages that a text is the source of, in JSON or as Python prints them, or the value itself."""
        if not isinstance(value, str) or not _MESSAGES_AS_TEXT.match(value):
            return value
        messages = _parsed(value)
        if isinstance(messages, dict):
            messages = [messages]
        if messages is None:
            raise UnusableRow("unreadable_messages")
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            return value
        self.cleaned.add("messages_as_text")
        return messages

    def _turns(self, value: Sequence[object], key: str) -> list[tuple[str, str]]:
        """Return role and text of the messages; a system prompt goes by the setting."""
        if not value:
            raise RecordError(f"{self.where}: {key!r} has no message")
        found = []
        for number, message in enumerate(value, 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RecordError(
                    f"{self.where}: message {number} of {key!r} must have 'role' and 'content', got {_show(message)}"
                )
            beside = [name for name in _BESIDE_CONTENT if _says_something(message.get(name))]
            if beside:
                raise UnusableRow(_BESIDE_CONTENT[beside[0]])
            if message["role"] == "system" and not _says_something(message.get("content")):
                continue
            if message["role"] == "system":
                self._system_prompt("not_single_turn")
                continue
            found.append(
                (message["role"], _content(message.get("content"), f"{key}[{number - 1}].content", self.where))
            )
        return found

    def _system_prompt(self, reason: str) -> None:
        if self.config.system_prompts == "drop":
            raise UnusableRow(reason)
        self.cleaned.add("system_prompt")


def after_prompt(prompt: str, answer: str) -> str | None:
    """Return what follows the prompt that an answer begins with; None where it surely or perhaps begins otherwise."""
    start = answer.find(prompt, 0, len(prompt) + _LONGEST_LABEL)
    if start < 0:
        return None
    label, rest = answer[:start], answer[start + len(prompt) :]
    if label.strip():
        if not _ASKER.fullmatch(label):
            return None
        answerer = _ANSWERER.match(rest)
        return rest[answerer.end() :] if answerer else rest
    if prompt[-1] not in "?\uff1f" and len(prompt) < _SURELY_REPEATED_CHARACTERS:
        return None
    # "... with a cat" is not what "... with a cathedral" begins with.
    return None if prompt[-1].isalnum() and rest[:1].isalnum() else rest


def _has_lines(text: str, lines: str) -> bool:
    """Return whether a text holds the other one, as whole lines."""
    return f"\n{lines.strip()}\n" in f"\n{text.strip()}\n"


def _says_something(value: object) -> bool:
    """Return whether any text or number is in a value."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(_says_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_says_something, value))
    # NaN: how pandas writes that there is none.
    return value is not None and value is not EMPTY and not (isinstance(value, float) and math.isnan(value))


def _scores_less(row: Mapping[str, Any], chosen: str, rejected: str) -> bool:
    """Return whether the row's own scores call the rejected answer the better one. Equal scores do not."""
    scores = [row.get(name) for name in (chosen, rejected)]
    # A boolean is no score; NaN is never less.
    numbers = [score for score in scores if isinstance(score, int | float) and not isinstance(score, bool)]
    return len(numbers) == 2 and numbers[0] < numbers[1]


def _is_message(value: object) -> bool:
    """Return whether a value is a message; ShareGPT's is one too, and refused as such."""
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or value.keys() == {"from", "value"})


def _parsed(text: str) -> object:
    """Return the value that a text is the source of, in JSON or in Python; None where it is of neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _content(value: object, key: str, where: str) -> str:
    """Return the text of a message: a text, or a list of parts that are texts."""
    if not isinstance(value, list):
        return _text(value, key, where, "text or a list of text parts")
    texts = []
    for number, part in enumerate(value, 1):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            found = f"of type {part['type']!r}" if isinstance(part, dict) and part.get("type") else kind(part)
            raise RecordError(f"{where}: part {number} of {key!r} is {found}, only text parts are read")
    return _text("".join(texts), key, where)


def _text(value: object, key: str, where: str, allowed: str = "text or a list of messages") -> str:
    if value is EMPTY:
        raise UnusableRow("empty")
    if not isinstance(value, str):
        raise RecordError(f"{where}: {key!r} must be {allowed}, got {kind(value)}")
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


def kind(value: object) -> str:
    """Return what a JSON value is and its beginning, for messages."""
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return "null" if value is None else f"{names.get(type(value), type(value).__name__)}, {_show(value)}"


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def control_token_pattern(tokens: Iterable[str], config: DataConfig) -> re.Pattern[str] | None:
    """Return a pattern that finds any of the tokens; None where config.control_tokens keeps them."""
    wanted = sorted(tokens) if config.control_tokens == "drop" else []
    return re.compile("|".join(map(re.escape, wanted))) if wanted else None

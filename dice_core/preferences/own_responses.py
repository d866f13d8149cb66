"""Responses that nobody's generate wrote: made into tables from texts, and looked at where they come as tables.

Token ids are what is scored and trained on, and texts are what people read and pairs are chosen by: here the two are
held together. The same is asked of a user's own pairs, and of scores that they are scores. Pure, but for the tokenizer.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dice_core.data.chat import ChatFormat, PromptTooLongError
from dice_core.data.records import PROMPTS, RESPONSES, ROWS_AT_A_TIME, SCORES, RecordError, conform, prompt_id
from dice_core.preferences.selection import PairError
from dice_core.progress import log

_UNFINISHED = "\ufffd"
"""What a character becomes whose last bytes were cut off."""
_NO_TOKEN = "<no such token>"
_OWN_IDS = (
    "give ids of this policy, or make the table from texts (responses: `dice import-responses`, pairs: `dice pair`)"
)
_FINISH_REASONS = ("stop", "length")
_LARGEST_LOGPS = 0.1
"""Nats. A sum of log-probs is at most 0, but for rounding."""


@dataclass
class ResponseTables:
    """Tables of responses, made from texts when they are asked for; the counts are whole when the last one was.

    Attributes:
        texts: sources.RESPONSE_TEXT, in any order.
        template: the chat format of the policy.
        prompt_ids: prompts of the run; responses to others are dropped. None keeps all.
        control_tokens: a response or prompt with a match is dropped; None keeps all.
        counts: num_prompts, num_responses, and num_dropped_<reason>: responses, of which a prompt has several.
    """

    texts: pa.Table
    template: ChatFormat
    prompt_ids: Container[str] | None = None
    control_tokens: re.Pattern[str] | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def tables(self) -> Iterator[pa.Table]:
        """Yield RESPONSES tables of some thousand rows; all responses to a prompt are in one of them.

        The ids are those that the model would have written, end of turn included: finish_reason is `stop`.
        """
        rows: list[dict[str, Any]] = []
        for prompt, responses in self._by_prompt().items():
            found = self._rows(prompt, responses)
            rows += found
            self.counts.update(num_prompts=bool(found), num_responses=len(found))
            if len(rows) >= ROWS_AT_A_TIME:
                yield pa.Table.from_pylist(rows, schema=RESPONSES)
                rows = []
        if rows:
            yield pa.Table.from_pylist(rows, schema=RESPONSES)

    def _by_prompt(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for batch in self.texts.to_batches(max_chunksize=ROWS_AT_A_TIME):
            for prompt, response in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                found.setdefault(prompt, []).append(response)
        return found

    def _rows(self, prompt: str, responses: list[str]) -> list[dict[str, Any]]:
        identity = prompt_id(prompt)
        reason, ids = "", list[int]()
        if self.prompt_ids is not None and identity not in self.prompt_ids:
            reason = "not_in_data"
        elif self._is_templated(prompt):
            reason = "control_tokens"
        else:
            try:
                ids = self.template.prompt_token_ids(prompt)
            except PromptTooLongError:
                reason = "prompt_too_long"
        kept = [] if reason else [response for response in responses if not self._is_templated(response)]
        self.counts[f"num_dropped_{reason or 'control_tokens'}"] += len(responses) - len(kept)
        return [
            {
                "prompt_id": identity,
                "sample_index": index,
                "prompt_token_ids": ids,
                "response_token_ids": self.template.response_token_ids(response),
                "response": response.strip(),
                "finish_reason": "stop",
            }
            for index, response in enumerate(kept)
        ]

    def _is_templated(self, text: str) -> bool:
        return self.control_tokens is not None and self.control_tokens.search(text) is not None


def checked(
    tables: Iterable[pa.Table], prompts: pa.Table, template: ChatFormat, where: str = "responses"
) -> Iterator[pa.Table]:
    """Yield tables of responses as they are, after a look at whether their token ids are the texts beside them.

    What the tokenizer itself cannot give back (it may drop case, or a character it does not know) is no difference.

    Args:
        tables: RESPONSES.
        prompts: PROMPTS; of a prompt that is not among them only the responses are looked at.
        template: the chat format of the policy that is trained on them.
        where: what messages call the tables.

    Raises:
        PairError: ids that are another text in the policy's tokenizer, or that do not end where the turn ends; another
            finish_reason than generate writes; a response that is there twice.
        RecordError: a table without its columns.
    """
    known = conform(prompts, PROMPTS, "prompts")
    texts = dict(zip(known["prompt_id"].to_pylist(), known["prompt"].to_pylist(), strict=True))
    frames_differ = False
    for table in tables:
        known_rows = conform(table, RESPONSES, where)
        _refuse_repeated(known_rows, where)
        for batch in known_rows.to_batches(max_chunksize=ROWS_AT_A_TIME):
            for row in batch.to_pylist():
                prompt = texts.get(row["prompt_id"])
                _check_row(row, texts, template, where)
                if prompt is not None and not frames_differ and _is_framed_otherwise(row, prompt, template):
                    frames_differ = True
                    log(
                        f"{where}: warning: prompt_token_ids of prompt_id {row['prompt_id']} and perhaps others are "
                        "not that prompt in the policy's chat format (chat.*): pairs keep them as they are"
                    )
        yield table


def check_pairs(pairs: pa.Table, template: ChatFormat, where: str) -> None:
    """Check that the token ids of a user's own pairs are the texts beside them, each with its end of turn.

    Args:
        pairs: PAIRS.
        template: the chat format of the policy that is trained on them.
        where: what messages call the table.

    Raises:
        PairError: they are not.
    """
    for batch in pairs.to_batches(max_chunksize=ROWS_AT_A_TIME):
        for row in batch.to_pylist():
            place = f"{where}: the pair of prompt_id {row['prompt_id']}"
            _require_tokens(place, row["prompt_token_ids"], template)
            for side in ("chosen", "rejected"):
                _require_text(place, f"{side}_token_ids", row[f"{side}_token_ids"], row[side], template)
                _require_end(place, f"{side}_token_ids", row[f"{side}_token_ids"], template)


def checked_scores(tables: Iterable[pa.Table], where: str = "scores") -> Iterator[pa.Table]:
    """Yield a user's own tables of scores as they are, after a look at whether these can be log-probs and lengths.

    Raises:
        PairError: they cannot. Losses, which are log-probs with the other sign, would turn every pair around.
        RecordError: a table without its columns.
    """
    for table in tables:
        scores = conform(table, SCORES, where)
        for name in ("policy_logps", "reference_logps"):
            _refuse_wrong(scores, name, pc.greater(scores[name], _LARGEST_LOGPS), "log-probs are at most 0", where)
        for name in ("num_chars", "num_tokens"):
            _refuse_wrong(scores, name, pc.less(scores[name], 0), "a length is at least 0", where)
        yield table


def _refuse_wrong(scores: pa.Table, column: str, is_wrong: pa.ChunkedArray, why: str, where: str) -> None:
    if (wrong := scores.filter(is_wrong)).num_rows:
        row = wrong.slice(0, 1).to_pylist()[0]
        raise PairError(
            f"{where}: {column} is {row[column]:g} for prompt_id {row['prompt_id']}, sample_index "
            f"{row['sample_index']} ({wrong.num_rows} of {scores.num_rows} rows are such): {why}"
        )


def _refuse_repeated(responses: pa.Table, where: str) -> None:
    counts = responses.group_by(["prompt_id", "sample_index"]).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1))
    if repeated.num_rows:
        row = repeated.slice(0, 1).to_pylist()[0]
        raise PairError(
            f"{where}: prompt_id {row['prompt_id']}, sample_index {row['sample_index']} is there {row['count_all']} "
            "times: number the responses to a prompt from 0"
        )


def _check_row(row: dict[str, Any], texts: dict[str, str], template: ChatFormat, where: str) -> None:
    place = f"{where}: prompt_id {row['prompt_id']}, sample_index {row['sample_index']}"
    if row["finish_reason"] not in _FINISH_REASONS:
        raise PairError(
            f"{place}: finish_reason must be 'stop', where the model ended its turn, or 'length', where it was cut "
            f"off, got {row['finish_reason']!r}"
        )
    _require_tokens(place, row["prompt_token_ids"], template)
    # Each prompt once.
    prompt = texts.pop(row["prompt_id"], None)
    if prompt is not None and not _asks(row["prompt_token_ids"], prompt, template):
        asked = _decoded(row["prompt_token_ids"], template)
        raise PairError(_other_text(place, "prompt_token_ids", asked, prompt))
    _require_text(place, "response_token_ids", row["response_token_ids"], row["response"], template)
    # A response of no tokens is dropped and counted later.
    if row["finish_reason"] == "stop" and row["response_token_ids"]:
        _require_end(place, "response_token_ids", row["response_token_ids"], template)


def _require_tokens(place: str, token_ids: list[int], template: ChatFormat) -> None:
    if not token_ids or _decoded(token_ids, template) == _NO_TOKEN:
        raise PairError(
            f"{place}: prompt_token_ids are none, or hold ids that the policy's tokenizer does not have: {_OWN_IDS}"
        )


def _require_text(place: str, column: str, token_ids: list[int], text: str, template: ChatFormat) -> None:
    said, text = _decoded(token_ids, template), text.strip()
    if _finished(said) == _finished(text):
        return
    if said != template.decode_response(template.response_token_ids(text)):
        raise PairError(_other_text(place, column, said, text))


def _require_end(place: str, column: str, token_ids: list[int], template: ChatFormat) -> None:
    """Check that the last token, and none before it, ends a turn; any control token may be the last.

    Without it a model learns not to stop; behind it there is padding.
    """
    if not template.is_control_token(token_ids[-1]):
        last = template.tokenizer.decode(token_ids[-1:])
        raise PairError(
            f"{place}: {column} end with {last!r} and not with the token that ends a turn, so that a model would learn "
            f"not to stop: {_OWN_IDS}"
        )
    ends = next(i for i, token_id in enumerate(token_ids) if i == len(token_ids) - 1 or template.is_end(token_id))
    if ends < len(token_ids) - 1:
        raise PairError(
            f"{place}: {column} go on after the token that ends the turn, for {len(token_ids) - 1 - ends} ids: cut "
            "padding off"
        )


def _is_framed_otherwise(row: dict[str, Any], prompt: str, template: ChatFormat) -> bool:
    try:
        return list(row["prompt_token_ids"]) != template.prompt_token_ids(prompt)
    except PromptTooLongError:
        return False


def _finished(text: str) -> str:
    return text.rstrip(_UNFINISHED).rstrip()


def _asks(token_ids: list[int], prompt: str, template: ChatFormat) -> bool:
    """Return whether ids hold a prompt, in whatever chat format."""
    asked = _decoded(token_ids, template)
    if prompt.strip() in asked:
        return True
    return template.decode_response(template.response_token_ids(prompt)) in asked


def _decoded(token_ids: list[int], template: ChatFormat) -> str:
    largest = len(template.tokenizer)
    return template.decode_response(token_ids) if all(0 <= i < largest for i in token_ids) else _NO_TOKEN


def _other_text(place: str, column: str, decoded: str, text: str) -> str:
    return (
        f"{place}: {column} are {decoded[:60]!r} in the policy's tokenizer, and the text is {text[:60]!r}: {_OWN_IDS}"
    )


def require_some(counts: Counter[str], source: str) -> None:
    """Raise a RecordError if no response is left; the message says where they went."""
    if not counts["num_responses"]:
        dropped = ", ".join(
            f"{count} {name.removeprefix('num_dropped_')}"
            for name, count in sorted(counts.items())
            if count and name.startswith("num_dropped_")
        )
        raise RecordError(f"{source}: no response is left, dropped: {dropped or 'none'}")

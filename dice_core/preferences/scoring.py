"""Which responses are valid, and their log-probs under policy and reference.

`logprobs` computes log-probs; `reward.py` and `selection.py` use them. Both models see the same batches with the same
dtype and kernels, so that equal weights give a reward of exactly 0. The rounding errors of bfloat16 do not cancel in a
reward: measured, those of policy and reference correlate by 0.04 to 0.18 only.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dice_core.accelerator import free_bytes
from dice_core.data import records
from dice_core.models.files import ModelError
from dice_core.preferences.settings import ScoringConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dice_core.logprobs.packing import PromptGroup

# What Python's str.strip takes away; Arrow's own trimming has a shorter list.
_WHITESPACE = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())

_ADVICE = (
    "give the task more GPUs (generation.tensor_parallel_size, which sampling uses too), or set a smaller "
    "scoring.tokens_per_batch"
)

MAX_NON_FINITE_SHARE = 0.1
"""Of a model's log-probs, more that are no finite numbers are not a few odd responses: the model is broken."""

Progress = Callable[[int, int], None]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
GivenRewards = Callable[[int, pa.Table], Floats]


@dataclass(frozen=True)
class Filtered:
    """Responses worth a forward pass, and how many were dropped for which reason (every reason present)."""

    responses: pa.Table
    num_dropped: dict[str, int]


def filter_responses(responses: pa.Table, config: ScoringConfig) -> Filtered:
    """Keep valid responses of prompts that have enough of them, in their order.

    Each dropped response counts once, for the first reason that holds: `length_limit` (generation was cut off),
    `empty` (no tokens), `too_short` and `too_long` (characters of the stripped text), `few_valid_responses` (valid
    itself, but its prompt has fewer than `min_valid_responses`). All responses of a prompt must be in the table.

    Source: upstream's generate_dpo_scores.py (3 < characters < 6700) and generate_lc_paired_set.py (n_least_score).

    Args:
        responses: of the schema RESPONSES.
        config: the limits.
    """
    num_chars = _num_chars(responses)
    reasons = {
        "length_limit": np.asarray(pc.equal(responses["finish_reason"], "length")),
        "empty": np.asarray(pc.list_value_length(responses["response_token_ids"])) == 0,
        "too_short": num_chars < config.min_characters,
        "too_long": num_chars > config.max_characters,
    }
    is_valid = np.ones(responses.num_rows, dtype=bool)  # (responses,)
    num_dropped = {}
    for reason, holds in reasons.items():
        num_dropped[reason] = int((is_valid & holds).sum())
        is_valid &= ~holds
    is_kept = is_valid & (_num_valid(responses, is_valid) >= config.min_valid_responses)
    num_dropped["few_valid_responses"] = int((is_valid & ~is_kept).sum())
    return Filtered(responses.filter(pa.array(is_kept)), num_dropped)


def _num_chars(responses: pa.Table) -> Ints:
    """Return the Unicode characters of each stripped response. Shape: (responses,)."""
    return np.asarray(pc.utf8_length(pc.utf8_trim(responses["response"], characters=_WHITESPACE)), dtype=np.int64)


def _num_valid(responses: pa.Table, is_valid: NDArray[np.bool_]) -> Ints:
    """Return for each row how many valid responses its prompt has. Both shapes: (responses,)."""
    prompts = _prompt_numbers(responses)
    return np.bincount(prompts[is_valid], minlength=int(prompts.max(initial=0)) + 1)[prompts]


def _prompt_numbers(responses: pa.Table) -> Ints:
    """Return a number for each row's prompt, in order of first appearance. Shape: (responses,)."""
    return np.asarray(responses["prompt_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64)


def score_parts(
    policy_folder: Path,
    reference_folder: Path,
    parts: Iterable[tuple[int, pa.Table]],
    config: ScoringConfig,
    on_progress: Progress | None = None,
    *,
    rewards: GivenRewards | None = None,
    take_turns: bool = False,
    on_placed: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, pa.Table]]:
    """Score parts of filtered responses one after another; each model is loaded once for all of them.

    Args:
        policy_folder: of fetch_model.
        reference_folder: likewise; if it is the policy's, one pass is made and every reward is exactly 0.
        parts: part indices and tables of the schema RESPONSES, as filter_responses leaves them; read one at a time.
        config: dtype of the weights, tokens per batch, and min_valid_responses.
        on_progress: called with (forwards done, all forwards) within each part; a forward is a response and a model.
        rewards: gives the rewards of a part, where the implicit one does not rank the responses. Shape: (responses,),
            NaN where there is none.
        take_turns: whether each model is on the accelerators only while it scores, even if both fit there.
        on_placed: called once with the most devices that a model is spread over.

    Yields:
        The part's index, and its table of the schema SCORES: without rows whose log-probs or given rewards are not
        finite, and without prompts that have fewer than min_valid_responses rows left.

    Raises:
        ModelError: a model cannot be loaded, makes logits in a way that is not known, or gives too many log-probs that
            are not finite.
        RecordError: a response has a token id that no model has.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in (policy_folder, reference_folder)))
    models = _Models(folders, config, take_turns)
    if on_placed:
        on_placed(models.num_devices)
    num_all, num_non_finite = 0, {"policy": 0, "reference": 0}
    for index, responses in parts:
        logps = models.score(responses, on_progress)
        num_all += responses.num_rows
        for role, found in (("policy", logps[0]), ("reference", logps[-1])):
            num_non_finite[role] += int((~np.isfinite(found)).sum())
            require_mostly_finite(num_non_finite[role], num_all, f"responses under the {role}")
        given = rewards(index, responses) if rewards else None
        yield index, _scores(responses, logps[0], logps[-1], given, config.min_valid_responses)


def require_mostly_finite(num_non_finite: int, num_all: int, what: str) -> None:
    """Check that a model's log-probs are numbers.

    Args:
        num_non_finite: log-probs that are not finite.
        num_all: log-probs in all.
        what: what a message says they are of.

    Raises:
        ModelError: more of them than MAX_NON_FINITE_SHARE are not.
    """
    if num_non_finite > MAX_NON_FINITE_SHARE * num_all:
        share = num_non_finite / num_all
        raise ModelError(
            f"log-probs of {num_non_finite} of {num_all} {what} are not finite numbers ({share:.0%}, "
            f"allowed are {MAX_NON_FINITE_SHARE:.0%}): the model is broken; import it again, or take another"
        )


def _scores(
    responses: pa.Table,
    policy_logps: Floats,
    reference_logps: Floats,
    given: Floats | None,
    min_valid_responses: int,
) -> pa.Table:
    """Return the SCORES of a part. Log-probs and given rewards: (responses,)."""
    is_finite = np.isfinite(policy_logps) & np.isfinite(reference_logps)  # (responses,)
    if given is not None:
        is_finite &= np.isfinite(given)
    columns = {
        "prompt_id": responses["prompt_id"],
        "sample_index": responses["sample_index"],
        "policy_logps": policy_logps,
        "reference_logps": reference_logps,
        "num_chars": _num_chars(responses),
        "num_tokens": pc.list_value_length(responses["response_token_ids"]),
        "reward": pa.nulls(responses.num_rows, pa.float64()) if given is None else given,
    }
    is_kept = is_finite & (_num_valid(responses, is_finite) >= min_valid_responses)
    return records.conform(pa.table(columns).filter(pa.array(is_kept)), records.SCORES, "scores")


class _Models:
    """The models of a shard, and where they are: on the accelerators together, or in turns."""

    def __init__(self, folders: list[Path], config: ScoringConfig, take_turns: bool) -> None:
        from dice_core.models import placement
        from dice_core.models.loading import load_model

        # First: without its GPUs nothing is worth loading.
        free = free_bytes()
        self._config = config
        self._models = [load_model(folder, config.dtype) for folder in folders]
        working = max(placement.working_bytes(model, config.tokens_per_batch) for model in self._models)
        parts = [placement.parts_of(model) for model in self._models]
        together = None if take_turns else placement.lay_out(parts, free, working)
        self._take_turns = together is None and len(folders) > 1
        self._layouts = together or [placement.lay_out_alone(model, free, working, _ADVICE) for model in self._models]
        for model, layout in zip(self._models, self._layouts, strict=True):
            placement.let_inputs_follow(model, layout)
            if not self._take_turns:
                placement.bring(model, layout)

    @property
    def num_devices(self) -> int:
        """The most devices that one of them is spread over."""
        return max(len(set(layout.values())) for layout in self._layouts)

    def score(self, responses: pa.Table, on_progress: Progress | None) -> list[Floats]:
        """Return the log-probs of every response under each model. Shape of each: (responses,)."""
        from dice_core.logprobs.forward import group_logps

        _check_ids(responses, self._models)
        groups, rows = _groups(responses)
        num_all = len(self._models) * responses.num_rows
        results = []
        for number, model in enumerate(self._models):
            num_before = number * responses.num_rows

            def progress(num_done: int, _: int, num_before: int = num_before) -> None:
                if on_progress:
                    on_progress(num_before + num_done, num_all)

            if self._take_turns:
                self._bring_alone(number)
            sums = group_logps(model, groups, tokens_per_batch=self._config.tokens_per_batch, on_progress=progress)
            logps = np.empty(responses.num_rows)  # (responses,), in the order of the rows
            logps[rows] = np.concatenate([[0.0], *sums])[1:]
            results.append(logps)
        return results

    def _bring_alone(self, number: int) -> None:
        from dice_core.models.loading import move
        from dice_core.models.placement import bring

        for other, model in enumerate(self._models):
            if other != number:
                move(model, "cpu")
        bring(self._models[number], self._layouts[number])


def _check_ids(responses: pa.Table, models: "list[PreTrainedModel]") -> None:
    """Refuse token ids that a model has no row for: they come from another tokenizer, or from a file of a user."""
    num_rows = min(len(model.get_input_embeddings().weight) for model in models)  # type: ignore[arg-type]
    for name in ("prompt_token_ids", "response_token_ids"):
        limits = pc.min_max(pc.list_flatten(responses[name])).as_py()
        for token_id in (limits["min"], limits["max"]):
            if token_id is not None and not 0 <= token_id < num_rows:
                raise records.RecordError(
                    f"responses: {name} has token id {token_id}, policy and reference have embeddings of {num_rows} "
                    "rows: give responses that this policy made"
                )


def _groups(responses: pa.Table) -> tuple[list["PromptGroup"], Ints]:
    """Return prompt groups in order of first appearance, and the row of each of their responses: (responses,)."""
    from dice_core.logprobs.forward import PromptGroup

    prompts = _prompt_numbers(responses)
    rows = np.argsort(prompts, kind="stable")
    prompt_ids, response_ids = _lists(responses["prompt_token_ids"]), _lists(responses["response_token_ids"])
    by_prompt = np.split(rows, np.flatnonzero(np.diff(prompts[rows])) + 1) if len(rows) else []
    groups = [PromptGroup(prompt_ids[members[0]], [response_ids[row] for row in members]) for members in by_prompt]
    return groups, rows


def _lists(column: pa.ChunkedArray) -> list[Ints]:
    """Return each row's token ids, views of one array. Shape of each: (tokens,)."""
    lists = column.combine_chunks()
    offsets = np.asarray(lists.offsets)
    values = np.asarray(lists.values)
    return [values[start:end] for start, end in itertools.pairwise(offsets)]

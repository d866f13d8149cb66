"""Which responses are valid, and their log-probs under policy and reference.

Log-probs themselves are logprobs.py's business, and what they are good for is reward.py's and selection.py's. Both
models see the same batches with the same dtype and kernels, so that what bfloat16 adds to both cancels in the reward.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dice_core.data import records
from dice_core.preferences.recorded_logps import check_recorded, recorded_logps
from dice_core.preferences.settings import ScoringConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What Python's str.strip takes away; Arrow's own trimming has a shorter list.
_WHITESPACE = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())

# Memory of an accelerator left to activations when both models are to stay on it.
_ACTIVATION_BYTES = 12 * 2**30

Progress = Callable[[int, int], None]


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
    is_valid = np.ones(responses.num_rows, dtype=bool)
    num_dropped = {}
    for reason, holds in reasons.items():
        num_dropped[reason] = int((is_valid & holds).sum())
        is_valid &= ~holds
    is_kept = is_valid & (_num_valid(responses, is_valid) >= config.min_valid_responses)
    num_dropped["few_valid_responses"] = int((is_valid & ~is_kept).sum())
    return Filtered(responses.filter(pa.array(is_kept)), num_dropped)


def _num_chars(responses: pa.Table) -> np.ndarray:
    """Return the Unicode characters of each stripped response."""
    return np.asarray(pc.utf8_length(pc.utf8_trim(responses["response"], characters=_WHITESPACE)), dtype=np.int64)


def _num_valid(responses: pa.Table, is_valid: np.ndarray) -> np.ndarray:
    """Return for each row how many valid responses its prompt has."""
    prompts = np.asarray(responses["prompt_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64)
    return np.bincount(prompts, weights=is_valid, minlength=1)[prompts]


def score_parts(
    policy_folder: Path,
    reference_folder: Path,
    parts: Iterable[tuple[int, pa.Table]],
    config: ScoringConfig,
    on_progress: Progress | None = None,
) -> Iterator[tuple[int, pa.Table, dict[str, int]]]:
    """Score parts of filtered responses one after another; each model is loaded once for all of them.

    The models stay on the accelerator together if both fit, and take turns on it if not.

    Args:
        policy_folder: of fetch_model.
        reference_folder: likewise; if it is the policy's, one pass is made and every reward is exactly 0.
        parts: part indices and tables of the schema RESPONSES, as filter_responses leaves them; read one at a time.
        config: dtype of the weights and tokens per batch.
        on_progress: called with (forwards done, all forwards) within each part; a forward is a response and a model.

    Yields:
        The part's index, its table of the schema SCORES, and how many rows were dropped because a log-prob was not
        finite, as {"non_finite": number}.

    Raises:
        ModelError: a model cannot be loaded, or makes logits in a way that is not known.
        RecordError: log-probs of generation are asked for, and are not there or differ from a forward pass.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in (policy_folder, reference_folder)))
    if config.policy_logps == "generation" and len(folders) > 1:
        yield from _score_references(folders[0], folders[1], parts, config, on_progress)
        return
    models = _Models(folders, config)
    for index, responses in parts:
        logps = models.score(responses, on_progress)
        yield index, *_scores(responses, logps[0], logps[-1])


def _score_references(
    policy_folder: Path,
    reference_folder: Path,
    parts: Iterable[tuple[int, pa.Table]],
    config: ScoringConfig,
    on_progress: Progress | None,
) -> Iterator[tuple[int, pa.Table, dict[str, int]]]:
    """Score with the reference alone, beside the policy's log-probs of generation; the first part is checked."""
    models: _Models | None = None
    for index, responses in parts:
        if responses.num_rows and models is None:
            # Gone before the reference is loaded.
            check_recorded(responses, lambda sample: _Models([policy_folder], config).score(sample, None)[0], config)
            models = _Models([reference_folder], config)
        reference = models.score(responses, on_progress)[0] if models else np.zeros(0)
        yield index, *_scores(responses, recorded_logps(responses), reference)


def _scores(
    responses: pa.Table, policy_logps: np.ndarray, reference_logps: np.ndarray
) -> tuple[pa.Table, dict[str, int]]:
    columns = {
        "prompt_id": responses["prompt_id"],
        "sample_index": responses["sample_index"],
        "policy_logps": policy_logps,
        "reference_logps": reference_logps,
        "num_chars": _num_chars(responses),
        "num_tokens": pc.list_value_length(responses["response_token_ids"]),
    }
    is_finite = np.isfinite(policy_logps) & np.isfinite(reference_logps)
    table = pa.table(columns).filter(pa.array(is_finite))
    return records.conform(table, records.SCORES, "scores"), {"non_finite": int((~is_finite).sum())}


class _Models:
    """The models of a shard, and where they are: on the accelerator together, or in turns."""

    def __init__(self, folders: list[Path], config: ScoringConfig) -> None:
        import torch

        from dice_core.models.loading import load_model

        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._models = [load_model(folder, config.dtype) for folder in folders]
        self._take_turns = len(folders) > 1 and not self._fit_together()
        if not self._take_turns:
            for model in self._models:
                model.to(self._device)

    def _fit_together(self) -> bool:
        import torch

        if self._device.type == "cpu":
            return True
        num_bytes = sum(weight.numel() * weight.element_size() for m in self._models for weight in m.parameters())
        return num_bytes + _ACTIVATION_BYTES <= torch.cuda.mem_get_info(self._device)[0]

    def score(self, responses: pa.Table, on_progress: Progress | None) -> list[np.ndarray]:
        """Return the log-probs of every response under each model, float64 of shape (responses,)."""
        from dice_core.logprobs.forward import group_logps

        groups, rows = _groups(responses)
        num_all = len(self._models) * responses.num_rows
        results = []
        for number, model in enumerate(self._models):
            num_before = number * responses.num_rows

            def progress(num_done: int, _: int, num_before: int = num_before) -> None:
                if on_progress:
                    on_progress(num_before + num_done, num_all)

            self._bring(model)
            sums = group_logps(model, groups, tokens_per_batch=self._config.tokens_per_batch, on_progress=progress)
            logps = np.empty(responses.num_rows)
            logps[rows] = np.concatenate([[0.0], *sums])[1:]
            results.append(logps)
        return results

    def _bring(self, model: "PreTrainedModel") -> None:
        if self._take_turns:
            for other in self._models:
                if other is not model:
                    other.to("cpu")
            model.to(self._device)


def _groups(responses: pa.Table) -> tuple[list, np.ndarray]:
    """Return prompt groups in order of first appearance, and the row of each of their responses."""
    from dice_core.logprobs.forward import PromptGroup

    prompts = np.asarray(responses["prompt_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64)
    rows = np.argsort(prompts, kind="stable")
    prompt_ids, response_ids = _lists(responses["prompt_token_ids"]), _lists(responses["response_token_ids"])
    by_prompt = np.split(rows, np.flatnonzero(np.diff(prompts[rows])) + 1) if len(rows) else []
    groups = [PromptGroup(prompt_ids[members[0]], [response_ids[row] for row in members]) for members in by_prompt]
    return groups, rows


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return each row's token ids, views of one array."""
    lists = column.combine_chunks()
    offsets = np.asarray(lists.offsets)
    values = np.asarray(lists.values)
    return [values[start:end] for start, end in itertools.pairwise(offsets)]

"""Which responses count, and their log-probs under policy and reference: the implicit reward is their difference.

Tables in, tables out; storage and resuming are the stage's business. How log-probs are computed is logprobs.py's.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dice_core import records
from dice_core.config import ScoringConfig
from dice_core.logprobs import PromptGroup, group_logps
from dice_core.models import load_model

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Filtered:
    """The responses worth scoring, and how many were dropped for each reason."""

    responses: pa.Table
    num_dropped: dict[str, int]


def filter_responses(responses: pa.Table, config: ScoringConfig) -> Filtered:
    """Drop responses that upstream throws away after scoring (generate_dpo_scores.py), before any forward pass.

    A response is dropped for the first reason that holds: `length_limit` (cut by the token limit), `too_short`,
    `too_long` (characters of the stripped text), `few_valid_responses` (of its prompt).

    Args:
        responses: records.RESPONSES; all responses of a prompt must be in this table.
        config: min_characters, max_characters, min_valid_responses are read.
    """
    lengths = pc.utf8_length(pc.utf8_trim_whitespace(responses["response"])).to_numpy()
    is_cut = pc.equal(responses["finish_reason"], "length").to_numpy()
    too_short = ~is_cut & (lengths < config.min_characters)
    too_long = ~is_cut & (lengths > config.max_characters)
    valid = ~(is_cut | too_short | too_long)
    prompt = responses["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    num_valid = np.bincount(prompt[valid], minlength=prompt.max(initial=-1) + 1)
    few = valid & (num_valid[prompt] < config.min_valid_responses)
    reasons = {"length_limit": is_cut, "too_short": too_short, "too_long": too_long, "few_valid_responses": few}
    kept = responses.filter(pa.array(valid & ~few))
    return Filtered(kept, {reason: int(mask.sum()) for reason, mask in reasons.items()})


def score_parts(
    policy_folder: Path,
    reference_folder: Path,
    parts: Iterable[tuple[int, pa.Table]],
    config: ScoringConfig,
    on_progress: Progress | None = None,
) -> Iterator[tuple[int, pa.Table, dict[str, int]]]:
    """Score the parts of a shard, one after another, with both models loaded once.

    Policy and reference run with the same dtype, kernels and batches, so that what rounding adds to one it adds to the
    other. The same folder for both is one pass, and rewards of exactly 0.

    Args:
        policy_folder: a model folder.
        reference_folder: another, or the same.
        parts: index and filtered records.RESPONSES of each part.
        config: dtype and tokens_per_batch are read.
        on_progress: called with prompts done and prompts of the part.

    Yields:
        Index, records.SCORES, and `non_finite`: the responses dropped because a log-prob was not a number.
    """
    policy = load_model(policy_folder, config.dtype)
    reference = policy if reference_folder == policy_folder else load_model(reference_folder, config.dtype)
    for index, responses in parts:
        table, num_non_finite = _score(policy, reference, responses, config, on_progress)
        yield index, table, {"non_finite": num_non_finite}


def _score(
    policy: Any, reference: Any, responses: pa.Table, config: ScoringConfig, on_progress: Progress | None
) -> tuple[pa.Table, int]:
    table = responses.sort_by([("prompt_id", "ascending"), ("sample_index", "ascending")])
    groups = _groups(table)
    policy_logps = _flat(group_logps(policy, groups, tokens_per_batch=config.tokens_per_batch, on_progress=on_progress))
    reference_logps = policy_logps
    if reference is not policy:
        reference_logps = _flat(group_logps(reference, groups, tokens_per_batch=config.tokens_per_batch))
    finite = np.isfinite(policy_logps) & np.isfinite(reference_logps)
    scores = pa.table(
        {
            "prompt_id": table["prompt_id"],
            "sample_index": table["sample_index"],
            "policy_logps": policy_logps,
            "reference_logps": reference_logps,
            "num_chars": pc.utf8_length(pc.utf8_trim_whitespace(table["response"])),
            "num_tokens": pc.list_value_length(table["response_token_ids"]),
        }
    )
    return records.conform(scores.filter(pa.array(finite)), records.SCORES, "scores"), int((~finite).sum())


def _groups(table: pa.Table) -> list[PromptGroup]:
    """Return a group per prompt of a table sorted by prompt."""
    groups: list[PromptGroup] = []
    last = None
    for prompt_id, prompt, response in zip(
        table["prompt_id"].to_pylist(),
        table["prompt_token_ids"].to_pylist(),
        table["response_token_ids"].to_pylist(),
        strict=True,
    ):
        if prompt_id != last:
            groups.append(PromptGroup(prompt, []))
            last = prompt_id
        groups[-1].responses.append(response)  # type: ignore[attr-defined]
    return groups


def _flat(logps: list[list[float]]) -> np.ndarray:
    return np.array([value for group in logps for value in group], dtype=np.float64)

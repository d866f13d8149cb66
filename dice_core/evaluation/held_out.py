"""Log-probs of held-out pairs and of sampled answers under one model: what implicit rewards are made of.

A table is of one model, so that whoever needs the model again finds it: rewards are differences of two tables.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dice_core.accelerator import free_bytes
from dice_core.data.chat import chat_format
from dice_core.data.records import PREFERENCES, RecordError, conform
from dice_core.data.settings import ChatConfig
from dice_core.evaluation.estimates import Floats
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.progress import Progress, doing, log

if TYPE_CHECKING:
    from dice_core.logprobs.forward import PromptGroup

PAIR_LOGPS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        # Nats, summed over the response tokens with the end-of-turn token.
        pa.field("chosen_logps", pa.float64(), False),
        pa.field("rejected_logps", pa.float64(), False),
    ]
)
ANSWER_LOGPS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        # Nats, summed over the response tokens, of the answers of both models.
        pa.field("policy_logps", pa.float64(), False),
        pa.field("incumbent_logps", pa.float64(), False),
    ]
)
_ADVICE = (
    "give the task more GPUs (generation.tensor_parallel_size, which sampling uses too), or set a smaller "
    "evaluation.tokens_per_batch"
)


@dataclass(frozen=True)
class HeldOutPairs:
    """Held-out pairs as token ids: those that fit the model's context, beyond which log-probs mean nothing."""

    prompt_ids: list[str]
    groups: "list[PromptGroup]"
    """Chosen first."""
    num_too_long: int


def tokenise_pairs(held_out: pa.Table, model_folder: Path, chat: ChatConfig) -> HeldOutPairs:
    """Tokenise the held-out pairs.

    Args:
        held_out: records.PREFERENCES.
        model_folder: the candidate, whose tokenizer and context count.
        chat: how texts become token ids.

    Raises:
        RecordError: no held-out pair, or none that fits.
        PromptTooLongError: a held-out prompt exceeds chat.max_prompt_tokens.
    """
    from dice_core.logprobs.forward import PromptGroup
    from dice_core.models.loading import context_length, load_config, load_tokenizer

    pairs = conform(held_out, PREFERENCES, "held-out pairs")
    context = context_length(load_config(model_folder))
    template = chat_format(load_tokenizer(model_folder), chat)
    groups, prompt_ids = [], []
    for row in pairs.to_pylist():
        responses = [template.response_token_ids(row[side]) for side in ("chosen", "rejected")]
        group = PromptGroup(template.prompt_token_ids(row["prompt"]), responses)
        if len(group.prompt_token_ids) + max(len(ids) for ids in responses) <= context:
            groups.append(group)
            prompt_ids.append(row["prompt_id"])
    if not groups:
        raise RecordError(
            f"held-out pairs: {pairs.num_rows} of them, none fits the model's context of {context} tokens: "
            "give shorter ones, or raise data.num_held_out"
        )
    return HeldOutPairs(prompt_ids, groups, pairs.num_rows - len(groups))


def score_under(
    model_folder: Path,
    config: EvaluationConfig,
    role: str,
    *,
    pairs: HeldOutPairs | None = None,
    answers: tuple[pa.Table, pa.Table] | None = None,
    on_placed: Callable[[int], None] | None = None,
) -> tuple[pa.Table | None, pa.Table | None]:
    """Return log-probs under a model, which may be no finite numbers, and leave nothing of the model in memory.

    Args:
        model_folder: in safetensors with its tokenizer.
        config: dtype and tokens_per_batch are read.
        role: of the model, for the log.
        pairs: whose PAIR_LOGPS are wanted; None: they are known.
        answers: records.RESPONSES of the candidate and of the incumbent, one to a prompt in the same order, whose
            ANSWER_LOGPS are wanted; None: they are known.
        on_placed: called with the devices that the model is spread over.
    """
    found = _score(model_folder, config, role, pairs, answers, on_placed)
    _free_memory()
    return found


def _score(
    model_folder: Path,
    config: EvaluationConfig,
    role: str,
    pairs: HeldOutPairs | None,
    answers: tuple[pa.Table, pa.Table] | None,
    on_placed: Callable[[int], None] | None,
) -> tuple[pa.Table | None, pa.Table | None]:
    from dice_core.logprobs.attention import use_checked_attention
    from dice_core.models import placement
    from dice_core.models.loading import load_model

    # First: without its GPUs nothing is worth loading.
    free = free_bytes()
    with doing(f"loading the {role}"):
        model = load_model(model_folder, config.dtype)
        working = placement.working_bytes(model, config.tokens_per_batch)
        layout = placement.lay_out_alone(model, free, working, _ADVICE)
        placement.let_inputs_follow(model, layout)
        placement.bring(model, layout)
    if on_placed:
        on_placed(len(set(layout.values())))
    use_checked_attention(model)
    of_pairs = of_answers = None
    if pairs is not None:
        log(f"evaluate: log-probs of {len(pairs.groups)} held-out pairs, {role}")
        logps = _group_logps(model, pairs.groups, config, f"evaluate: log-probs, {role}")
        columns = {"prompt_id": pairs.prompt_ids, "chosen_logps": logps[:, 0], "rejected_logps": logps[:, 1]}
        of_pairs = pa.table(columns, schema=PAIR_LOGPS)
    if answers is not None:
        log(f"evaluate: log-probs of both models' answers to {answers[0].num_rows} prompts, {role}")
        logps = _group_logps(model, _answer_groups(*answers), config, f"evaluate: log-probs of answers, {role}")
        columns = {"prompt_id": answers[0]["prompt_id"], "policy_logps": logps[:, 0], "incumbent_logps": logps[:, 1]}
        of_answers = pa.table(columns, schema=ANSWER_LOGPS)
    return of_pairs, of_answers


def _answer_groups(policy: pa.Table, incumbent: pa.Table) -> "list[PromptGroup]":
    from dice_core.logprobs.forward import PromptGroup

    ids = (policy["prompt_token_ids"], policy["response_token_ids"], incumbent["response_token_ids"])
    rows = zip(*(column.to_pylist() for column in ids), strict=True)
    return [PromptGroup(prompt, [answer, other]) for prompt, answer, other in rows]


def as_array(logps: pa.Table) -> Floats:
    """Return the two columns of log-probs of a table. Shape: (rows, 2)."""
    return np.stack([column.to_numpy() for column in logps.columns[1:]], axis=1).astype(np.float64)


def _group_logps(model: Any, groups: "Sequence[PromptGroup]", config: EvaluationConfig, what: str) -> Floats:
    """Return summed log-probs in nats. Shape: (groups, 2)."""
    from dice_core.logprobs.forward import group_logps

    progress = Progress(what, "responses", tells_end=False).begin()
    logps = group_logps(model, groups, tokens_per_batch=config.tokens_per_batch, on_progress=progress)
    return np.array(logps, dtype=np.float64).reshape(-1, 2)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

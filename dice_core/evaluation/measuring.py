"""Measures a new policy against the one before it: held-out rewards, sampled answers, and the gate's verdict on them.

The implicit reward on held-out pairs is taken against one base reference for both policies (the run's first reference),
so that their accuracies and margins can be compared; the reward of the new policy against the previous one, with which
the next iteration will score, is reported beside it. Models are loaded one after another. `gate.py` decides.
"""

import gc
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dice_core.accelerator import device_type
from dice_core.data.chat import ChatFormat, chat_format
from dice_core.data.records import PREFERENCES, RecordError, conform
from dice_core.data.settings import ChatConfig
from dice_core.evaluation.answers import Answer, sample_answers
from dice_core.evaluation.estimates import Estimate, accuracy, accuracy_change, growth, mean
from dice_core.evaluation.gate import Findings, Gate, decide
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.responses import stop_token_ids
from dice_core.generation.settings import GenerationConfig
from dice_core.logprobs.attention import use_checked_attention
from dice_core.logprobs.forward import PromptGroup, group_logps
from dice_core.models.loading import context_length, load_config, load_model, load_tokenizer
from dice_core.preferences.reward import implicit_reward
from dice_core.preferences.scoring import require_mostly_finite
from dice_core.progress import Progress, doing, log
from dice_core.storage.manifest import Metric

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, and how both policies answer it."""

    prompt: str
    previous: Answer
    policy: Answer


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and the decision."""

    estimates: dict[str, Estimate]
    counts: dict[str, int]
    gate: Gate
    samples: list[Sample] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether the run may go on with the new policy."""
        return self.gate.accepted

    @property
    def promotable(self) -> bool:
        """Whether the new policy is accepted and better than the previous one."""
        return self.gate.promotable

    def metrics(self) -> dict[str, Metric]:
        """Return all numbers, flat; a standard error has the suffix `_se`; what could not be measured is left out."""
        numbers = {name: estimate.value for name, estimate in self.estimates.items()}
        numbers |= {f"{name}_se": estimate.standard_error for name, estimate in self.estimates.items()}
        known = {name: value for name, value in numbers.items() if math.isfinite(value)}
        verdict = {"accepted": int(self.accepted), "improved": int(self.gate.improved)}
        return {**known, **self.counts, **verdict, "reason": self.gate.reason}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: `metrics`, `gate`, `samples`."""
        return {
            "metrics": self.metrics(),
            "gate": asdict(self.gate),
            "samples": [asdict(sample) for sample in self.samples],
        }


@dataclass(frozen=True)
class _HeldOut:
    """Held-out pairs as token ids, and the prompts to answer."""

    groups: list[PromptGroup]
    prompts: list[str]
    template: ChatFormat


def evaluate_policy(
    policy_folder: Path,
    previous_folder: Path,
    base_reference_folder: Path,
    held_out: pa.Table,
    *,
    evaluation: EvaluationConfig,
    chat: ChatConfig,
    generation: GenerationConfig,
    seed: int,
) -> Evaluation:
    """Measure the new policy on held-out pairs and prompts, beside the previous one.

    Args:
        policy_folder: pi_t.
        previous_folder: pi_{t-1}.
        base_reference_folder: the run's first reference, such as the SFT model.
        held_out: records.PREFERENCES; its first distinct prompts are answered (its order is random already).
        evaluation: how much is measured, and the gate's bounds.
        chat: as in every stage of the run.
        generation: how answers are sampled; evaluation.max_new_tokens, where it is given, takes the place of its limit.
        seed: of the samples.

    Raises:
        RecordError: no held-out pair, or none that fits the model's context.
        PromptTooLongError: a held-out prompt exceeds chat.max_prompt_tokens.
        ModelError: the previous policy or the base reference gives log-probs that are not finite.
    """
    pairs = conform(held_out, PREFERENCES, "held-out pairs")
    data = _tokenise(pairs, policy_folder, evaluation, chat)
    stop_ids = stop_token_ids(policy_folder, data.template, generation)
    sample = partial(
        sample_answers,
        template=data.template,
        prompts=data.prompts,
        generation=generation,
        stop_ids=stop_ids,
        max_new_tokens=evaluation.max_new_tokens or generation.max_new_tokens,
        seed=seed,
    )
    summary = partial(summarise, config=evaluation, num_too_long_pairs=pairs.num_rows - len(data.groups))
    logps: dict[Path, Floats] = {}
    answers: dict[Path, list[Answer]] = {}
    # Each model is in memory once and alone; the base may be the previous policy itself.
    for folder in dict.fromkeys([policy_folder, previous_folder, base_reference_folder]):
        role = "policy" if folder == policy_folder else "previous" if folder == previous_folder else "base reference"
        with doing(f"loading the {role}"):
            model = load_model(folder, evaluation.dtype, device=device_type())
        use_checked_attention(model)
        attention = model.config._attn_implementation
        log(f"evaluate: log-probs of {len(data.groups)} held-out pairs, {role}")
        progress = Progress(f"evaluate: log-probs, {role}", "responses", tells_end=False).begin()
        logps[folder] = _pair_logps(model, data.groups, evaluation.tokens_per_batch, progress)
        num_non_finite = int((~np.isfinite(logps[folder])).any(axis=1).sum())
        if num_non_finite and folder == policy_folder:
            # The gate refuses it. From what are no numbers nothing can be sampled.
            unknown = np.full_like(logps[folder], math.nan)
            return summary(logps[folder], unknown, unknown, [])
        require_mostly_finite(num_non_finite, len(data.groups), f"held-out pairs under the {role} ({folder})")
        if folder in (previous_folder, policy_folder):
            # An attention that is made for packed rows is slow at sampling.
            model.set_attn_implementation(attention)
            log(f"evaluate: answers to {len(data.prompts)} held-out prompts, {role}")
            told = Progress(f"evaluate: answers, {role}", "prompts", tells_end=False).begin()
            answers[folder] = sample(model, on_progress=told)
        del model
        _free_memory()
    texts = zip(data.prompts, answers[previous_folder], answers[policy_folder], strict=True)
    samples = [Sample(*row) for row in texts]
    return summary(logps[policy_folder], logps[previous_folder], logps[base_reference_folder], samples)


def summarise(
    policy_logps: Floats,
    previous_logps: Floats,
    base_logps: Floats,
    samples: Sequence[Sample],
    config: EvaluationConfig,
    num_too_long_pairs: int = 0,
) -> Evaluation:
    """Turn log-probs and answers into estimates and the gate's decision. No model needed.

    Args:
        policy_logps: summed log-probs in nats, chosen first. Shape: (pairs, 2)
        previous_logps: Shape: (pairs, 2)
        base_logps: Shape: (pairs, 2)
        samples: answers of both policies.
        config: the gate's bounds.
        num_too_long_pairs: that were left out before, for the record.
    """
    finite = np.isfinite(np.hstack([policy_logps, previous_logps, base_logps])).all(axis=1)  # (pairs,)
    num_non_finite = int((~np.isfinite(policy_logps)).any(axis=1).sum())
    policy, previous, base = (logps[finite] for logps in (policy_logps, previous_logps, base_logps))  # (finite, 2)
    new, old, step = (implicit_reward(policy, base), implicit_reward(previous, base), implicit_reward(policy, previous))
    estimates = {**_reward_estimates(new, old, step), **_answer_estimates(samples)}
    counts = {
        "num_held_out_pairs": len(policy),
        "num_heldout_ties": _num_ties(new),
        "num_heldout_ties_previous": _num_ties(old),
        "num_too_long_pairs": num_too_long_pairs,
        "num_non_finite_pairs": int((~finite).sum()),
        "num_sample_prompts": len(samples),
    }
    findings = Findings(
        accuracy=estimates["heldout_reward_accuracy"].value,
        accuracy_previous=estimates["heldout_reward_accuracy_previous"].value,
        accuracy_change=estimates["heldout_reward_accuracy_change"],
        margin=estimates["heldout_reward_margin"].value,
        margin_previous=estimates["heldout_reward_margin_previous"].value,
        length_growth=estimates["response_characters_growth"],
        num_answers=len(samples),
        num_distinct_answers=len({sample.policy.text for sample in samples}),
        share_empty=estimates["share_empty_responses"].value,
        share_cut=estimates["share_cut_responses"].value,
        share_cut_previous=estimates["share_cut_responses_previous"].value,
        num_non_finite_pairs=num_non_finite,
    )
    return Evaluation(estimates, counts, decide(findings, config), list(samples))


def _reward_estimates(new: Floats, old: Floats, step: Floats) -> dict[str, Estimate]:
    """Estimate accuracies and margins. Rewards are in nats, without beta, chosen first, of shape (pairs, 2)."""
    margin, margin_old, margin_step = (rewards[:, 0] - rewards[:, 1] for rewards in (new, old, step))  # (pairs,)
    return {
        "heldout_reward_accuracy": accuracy(margin),
        "heldout_reward_accuracy_previous": accuracy(margin_old),
        "heldout_reward_accuracy_change": accuracy_change(margin, margin_old),
        "heldout_reward_margin": mean(margin),
        "heldout_reward_margin_previous": mean(margin_old),
        "heldout_reward_margin_change": mean(margin - margin_old),
        "heldout_chosen_reward": mean(new[:, 0]),
        "heldout_rejected_reward": mean(new[:, 1]),
        "heldout_step_accuracy": accuracy(margin_step),
        "heldout_step_margin": mean(margin_step),
    }


def _answer_estimates(samples: Sequence[Sample]) -> dict[str, Estimate]:
    new, old = [sample.policy for sample in samples], [sample.previous for sample in samples]
    lengths, lengths_old = [len(answer.text) for answer in new], [len(answer.text) for answer in old]
    return {
        "mean_response_characters": mean(lengths),
        "mean_response_characters_previous": mean(lengths_old),
        "response_characters_change": mean(np.subtract(lengths, lengths_old)),
        "response_characters_growth": growth(lengths, lengths_old),
        "share_empty_responses": mean([not answer.text for answer in new]),
        "share_empty_responses_previous": mean([not answer.text for answer in old]),
        "share_cut_responses": mean([answer.is_cut for answer in new]),
        "share_cut_responses_previous": mean([answer.is_cut for answer in old]),
    }


def _num_ties(rewards: Floats) -> int:
    return int((rewards[:, 0] == rewards[:, 1]).sum())


def _tokenise(pairs: pa.Table, folder: Path, evaluation: EvaluationConfig, chat: ChatConfig) -> _HeldOut:
    """Tokenise the pairs that fit the model's context: beyond it log-probs mean nothing."""
    context = context_length(load_config(folder))
    template = chat_format(load_tokenizer(folder), chat)
    groups = []
    for row in pairs.to_pylist():
        responses = [template.response_token_ids(row[side]) for side in ("chosen", "rejected")]
        group = PromptGroup(template.prompt_token_ids(row["prompt"]), responses)
        if len(group.prompt_token_ids) + max(len(ids) for ids in responses) <= context:
            groups.append(group)
    if not groups:
        raise RecordError(
            f"held-out pairs: {pairs.num_rows} of them, none fits the model's context of {context} tokens: "
            "give shorter ones, or raise data.num_held_out"
        )
    prompts = list(dict.fromkeys(pairs["prompt"].to_pylist()))
    return _HeldOut(groups, prompts[: evaluation.num_sample_prompts], template)


def _pair_logps(model: Any, groups: Sequence[PromptGroup], tokens_per_batch: int, progress: Progress) -> Floats:
    """Return summed log-probs in nats, chosen first. Shape: (pairs, 2)."""
    logps = group_logps(model, groups, tokens_per_batch=tokens_per_batch, on_progress=progress)
    return np.array(logps, dtype=np.float64).reshape(-1, 2)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

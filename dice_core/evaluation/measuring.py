"""Turns what two models answered, scored and were judged by into numbers and the gate's decision. Needs no model.

The implicit reward on held-out pairs is taken against one base reference for all policies (the run's first reference),
so that their accuracies and margins can be compared; the reward of the candidate against the previous policy, with
which the next iteration will score, is reported beside it. `result.py` says what each number is, `gate.py` decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dice_core.evaluation.estimates import (
    UNKNOWN,
    Estimate,
    Floats,
    accuracy,
    accuracy_change,
    growth,
    mean,
    ratio,
)
from dice_core.evaluation.gate import NO_CHANGES, Changes, Findings, Judged, decide
from dice_core.evaluation.length_controlled import length_controlled_win_rate
from dice_core.evaluation.result import Answer, Evaluation, Sample
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.evaluation.win_rate import (
    ADDED,
    detectable_difference,
    flip_rate,
    num_needed,
    tally,
    win_rate,
)
from dice_core.preferences.reward import implicit_reward

NO_JUDGE = "none"


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs of the held-out pairs in nats, chosen first. Shape of each: (pairs, 2)."""

    policy: Floats
    incumbent: Floats
    previous: Floats
    base: Floats
    num_too_long: int = 0
    """Pairs that were left out before."""


def summarise(
    pairs: PairLogps,
    samples: Sequence[Sample],
    config: EvaluationConfig,
    *,
    previous: Sequence[Answer] | None = None,
    judge: str = NO_JUDGE,
    seed: int = 0,
) -> Evaluation:
    """Turn log-probs, answers and verdicts into estimates and the gate's decision.

    Args:
        pairs: log-probs under the models.
        samples: answers of both models, with rewards and verdicts where there are any.
        config: the gate's bounds.
        previous: answers of the policy before the candidate to the same prompts; None: it is the incumbent.
        judge: who gave the verdicts; NO_JUDGE: nobody, and held-out accuracy decides.
        seed: of resampling.
    """
    estimates, counts, num_broken = _of_pairs(pairs)
    estimates |= _of_answers(samples, previous)
    counts |= {
        "num_sample_prompts": len(samples),
        "num_distinct_responses": len({sample.policy.text for sample in samples}),
    }
    judged = None
    if judge != NO_JUDGE:
        more_estimates, more_counts = _of_verdicts(samples, seed)
        estimates, counts = estimates | more_estimates, counts | more_counts
        judged = Judged(estimates["win_rate"], estimates["length_controlled_win_rate"], counts["share_parsed_verdicts"])
    counts |= _power(estimates, counts, judged is not None, config.wanted_difference)
    findings = _findings(estimates, counts, judged, num_broken)
    if previous is not None:
        findings = replace(findings, previous=_changes(estimates, "_previous"))
    gate = decide(findings, config)
    return Evaluation(estimates, counts, gate, list(samples), judge, config.wanted_difference)


def refused_unmeasured(reason: str, config: EvaluationConfig, *, judge: str = NO_JUDGE) -> Evaluation:
    """Return the evaluation of a candidate that nothing can be sampled from.

    Args:
        reason: one line.
        config: the gate's bounds.
        judge: who would have judged.
    """
    judged = None if judge == NO_JUDGE else Judged(UNKNOWN, UNKNOWN, math.nan)
    unknown = Findings(
        accuracy=math.nan,
        accuracy_incumbent=math.nan,
        incumbent=NO_CHANGES,
        drift=UNKNOWN,
        share_cut=math.nan,
        share_empty=math.nan,
        num_answers=0,
        num_distinct_answers=0,
        num_pairs=0,
        judged=judged,
        broken_weights=reason,
    )
    counts: dict[str, int | float] = {"num_held_out_pairs": 0, "num_sample_prompts": 0}
    return Evaluation({}, counts, decide(unknown, config), [], judge, config.wanted_difference)


def _of_pairs(pairs: PairLogps) -> tuple[dict[str, Estimate], dict[str, int | float], int]:
    """Return estimates, counts, and the number of pairs that the candidate gave no finite log-prob for."""
    everything = (pairs.policy, pairs.incumbent, pairs.previous, pairs.base)
    finite = np.isfinite(np.hstack(everything)).all(axis=1)  # (pairs,)
    num_broken = int((~np.isfinite(pairs.policy)).any(axis=1).sum())
    policy, incumbent, previous, base = (logps[finite] for logps in everything)  # (finite, 2) each
    new, old, before = (implicit_reward(logps, base) for logps in (policy, incumbent, previous))
    step = implicit_reward(policy, previous)
    # Margins of shape (finite,).
    margin, margin_old, margin_before, margin_step = (
        rewards[:, 0] - rewards[:, 1] for rewards in (new, old, before, step)
    )
    estimates = {
        "heldout_reward_accuracy": accuracy(margin),
        "heldout_reward_accuracy_incumbent": accuracy(margin_old),
        "heldout_reward_accuracy_previous": accuracy(margin_before),
        "heldout_reward_accuracy_change": accuracy_change(margin, margin_old),
        "heldout_reward_accuracy_change_previous": accuracy_change(margin, margin_before),
        "heldout_reward_margin": mean(margin),
        "heldout_reward_margin_incumbent": mean(margin_old),
        "heldout_reward_margin_change": mean(margin - margin_old),
        "heldout_chosen_reward": mean(new[:, 0]),
        "heldout_rejected_reward": mean(new[:, 1]),
        "heldout_step_accuracy": accuracy(margin_step),
        "heldout_step_margin": mean(margin_step),
    }
    counts: dict[str, int | float] = {
        "num_held_out_pairs": len(policy),
        "num_heldout_ties": int((margin == 0).sum()),
        "num_heldout_ties_incumbent": int((margin_old == 0).sum()),
        "num_too_long_pairs": pairs.num_too_long,
        "num_non_finite_pairs": int((~finite).sum()),
    }
    return estimates, counts, num_broken


def _of_answers(samples: Sequence[Sample], previous: Sequence[Answer] | None) -> dict[str, Estimate]:
    new, old = [sample.policy for sample in samples], [sample.incumbent for sample in samples]
    before = old if previous is None else previous
    lengths, lengths_old, lengths_before = ([len(answer.text) for answer in some] for some in (new, old, before))
    cut, cut_old, cut_before = ([answer.is_cut for answer in some] for some in (new, old, before))
    return {
        "mean_response_characters": mean(lengths),
        "mean_response_characters_incumbent": mean(lengths_old),
        "mean_response_characters_previous": mean(lengths_before),
        "response_characters_change": mean(np.subtract(lengths, lengths_old)),
        "response_characters_growth": growth(lengths, lengths_old),
        "response_characters_growth_previous": growth(lengths, lengths_before),
        "share_empty_responses": mean([not answer.text for answer in new]),
        "share_empty_responses_incumbent": mean([not answer.text for answer in old]),
        "share_cut_responses": mean(cut),
        "share_cut_responses_incumbent": mean(cut_old),
        "share_cut_responses_previous": mean(cut_before),
        "share_cut_responses_change": accuracy_change(_signs(cut), _signs(cut_old)),
        "share_cut_responses_change_previous": accuracy_change(_signs(cut), _signs(cut_before)),
        "drift_per_token": _drift(new),
    }


def _signs(are_cut: Sequence[bool]) -> Floats:
    """Return 1 where an answer is cut, -1 elsewhere: a share of these is an accuracy."""
    return np.where(np.asarray(are_cut, dtype=bool), 1.0, -1.0)


def _drift(answers: Sequence[Answer]) -> Estimate:
    """Estimate the KL divergence of the candidate from the first policy per token, on the candidate's own answers.

    The plain mean of the log ratio: without bias for the distribution that was sampled from, which temperature and
    top_p make a little narrower than the model's own.
    """
    known = [(answer.reward, answer.num_tokens) for answer in answers if answer.reward is not None]
    return ratio([reward for reward, _ in known], [size for _, size in known])


def _of_verdicts(samples: Sequence[Sample], seed: int) -> tuple[dict[str, Estimate], dict[str, int | float]]:
    """Return estimates and counts of what the judge said. A verdict that is missing counts nowhere."""
    asked = [sample for sample in samples if not sample.is_tie]
    found = [(sample, preference) for sample in samples if (preference := _preference(sample)) is not None]
    preferences = np.array([preference for _, preference in found], dtype=np.float64)  # (judged,)
    lengths, lengths_old = (
        np.array([len(answer.text) for answer in answers], dtype=np.float64)
        for answers in ([one.policy for one, _ in found], [one.incumbent for one, _ in found])
    )
    flips = [one.verdict.flipped for one in asked if one.verdict and one.verdict.flipped is not None]
    wins = tally(preferences, [bool(one.verdict and one.verdict.flipped) for one, _ in found])
    num_missing = len(samples) - len(found)
    estimates = {
        "win_rate": win_rate(preferences, [one.prompt_id for one, _ in found], seed=seed),
        "length_controlled_win_rate": length_controlled_win_rate(preferences, lengths, lengths_old, seed=seed),
        "reward_judge_agreement": accuracy(_agreements(found)),
    }
    counts: dict[str, int | float] = {
        "num_judged_prompts": len(found),
        "num_missing_verdicts": num_missing,
        "num_same_answers": len(samples) - len(asked),
        "share_parsed_verdicts": 1 - num_missing / len(asked) if asked else 1.0 if samples else math.nan,
        "num_wins": wins.wins,
        "num_ties": wins.ties,
        "num_losses": wins.losses,
        "sign_test_p": wins.sign_test_p,
        "flip_rate": flip_rate(flips),
    }
    return estimates, counts


def _preference(sample: Sample) -> float | None:
    if sample.is_tie:
        return 0.5
    return sample.verdict.preference if sample.verdict else None


def _agreements(found: Sequence[tuple[Sample, float]]) -> Floats:
    """Return the margin of rewards on the judge's side, of prompts where it takes one. Shape: (some prompts,)."""
    return np.array(
        [
            (one.policy.reward - one.incumbent.reward) * np.sign(preference - 0.5)
            for one, preference in found
            if preference != 0.5 and one.policy.reward is not None and one.incumbent.reward is not None
        ],
        dtype=np.float64,
    )


def _power(
    estimates: dict[str, Estimate], counts: dict[str, int | float], is_judged: bool, wanted: float
) -> dict[str, int | float]:
    """Return what so many prompts or pairs can show, by the spread that they have shown."""
    deciding = estimates["win_rate" if is_judged else "heldout_reward_accuracy_change"]
    num = int(counts["num_judged_prompts" if is_judged else "num_held_out_pairs"])
    if not num or not math.isfinite(deciding.standard_error):
        return {}
    # Their errors hold as many more: four prompts, two pairs.
    spread = deciding.standard_error * math.sqrt(num + (len(ADDED) if is_judged else 2))
    return {"detectable_difference": detectable_difference(num, spread), "num_needed": num_needed(wanted, spread)}


def _changes(estimates: dict[str, Estimate], suffix: str = "") -> Changes:
    """Return the candidate's changes against the incumbent, or with a suffix against the previous policy."""
    return Changes(
        accuracy=estimates[f"heldout_reward_accuracy_change{suffix}"],
        length=estimates[f"response_characters_growth{suffix}"],
        cut=estimates[f"share_cut_responses_change{suffix}"],
        share_cut=estimates[f"share_cut_responses{suffix or '_incumbent'}"].value,
    )


def _findings(
    estimates: dict[str, Estimate], counts: dict[str, int | float], judged: Judged | None, num_broken: int
) -> Findings:
    return Findings(
        accuracy=estimates["heldout_reward_accuracy"].value,
        accuracy_incumbent=estimates["heldout_reward_accuracy_incumbent"].value,
        incumbent=_changes(estimates),
        drift=estimates["drift_per_token"],
        share_cut=estimates["share_cut_responses"].value,
        share_empty=estimates["share_empty_responses"].value,
        num_answers=int(counts["num_sample_prompts"]),
        num_distinct_answers=int(counts["num_distinct_responses"]),
        num_pairs=int(counts["num_held_out_pairs"]),
        num_prompts=int(counts.get("num_judged_prompts", 0)),
        judged=judged,
        detectable_difference=float(counts.get("detectable_difference", math.nan)),
        num_needed=int(counts.get("num_needed", 0)),
        num_non_finite_pairs=num_broken,
    )

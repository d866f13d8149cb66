"""Whether a new policy is accepted, and whether it improved: pure functions of what `measuring.py` measured.

Accepted means that the run may go on with it: it broke no bound. Improved means that it is better than the policy
before it. A policy that is accepted and did not improve goes on and is not promoted; where one after another does not,
further iterations gain nothing.

A bound of the settings is a limit on the true change. Measured changes are noisy, the more so on few pairs and prompts,
so a policy is refused when its change lies beyond the bound by more than two standard errors. A change beyond the bound
by less is accepted with a warning: the remedy for it is more held-out pairs or sample prompts, not a coin toss.
"""

import math
from dataclasses import dataclass

from dice_core.evaluation.estimates import Estimate
from dice_core.evaluation.settings import EvaluationConfig

NO_GAIN = "no gain"
"""What an accepted policy that did not improve is called, wherever people read of it."""

# An answer to every prompt that is one and the same text is only telling from so many prompts on.
_FEWEST_PROMPTS_TO_COMPARE = 4


@dataclass(frozen=True)
class Findings:
    """What the gate looks at, of the new policy unless it says otherwise. Shares are of the sampled answers."""

    accuracy: float
    """Held-out reward accuracy against the run's base reference."""
    accuracy_previous: float
    """That of the previous policy, against the same reference on the same pairs."""
    accuracy_change: Estimate
    """The first minus the second."""
    margin: float
    """Mean held-out reward margin in nats, against the same reference."""
    margin_previous: float
    length_growth: Estimate
    """Mean characters of an answer relative to the previous policy's on the same prompts, minus 1."""
    num_answers: int
    num_distinct_answers: int
    share_empty: float
    share_cut: float
    """Ended by the limit of tokens."""
    share_cut_previous: float
    num_non_finite_pairs: int = 0
    """Held-out pairs for which the policy gave a log-prob that is not a number."""


@dataclass(frozen=True)
class Gate:
    """The decision. Reasons say why a policy is refused; warnings what a person should know of an accepted one too."""

    accepted: bool
    improved: bool
    comparison: str
    """By what it improved or not, in words."""
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def promotable(self) -> bool:
        """Whether the policy is to take the place of the last promoted one."""
        return self.accepted and self.improved

    @property
    def reason(self) -> str:
        """One line for manifests and logs."""
        return "; ".join(self.reasons) or (self.comparison if self.improved else f"{NO_GAIN}: {self.comparison}")


def decide(findings: Findings, config: EvaluationConfig) -> Gate:
    """Accept or refuse a policy, and say whether it is better than the one before it.

    It improved when its held-out accuracy is higher, or the same with a higher margin. No significance is asked for: a
    gain of few pairs is a gain until more held-out pairs say otherwise, and its standard error stands beside it.

    Args:
        findings: what was measured.
        config: max_accuracy_drop and max_length_growth are read.
    """
    reasons, warnings = _degenerate(findings), _limits_of_measurement(findings)
    drop = Estimate(-findings.accuracy_change.value, findings.accuracy_change.standard_error)
    bounded = [
        (drop, config.max_accuracy_drop, "held-out reward accuracy fell by", " points", "max_accuracy_drop"),
        (findings.length_growth, config.max_length_growth, "answers grew by", "%", "max_length_growth"),
    ]
    for change, bound, words, unit, setting in bounded:
        error = f"{100 * change.standard_error:.1f}" if math.isfinite(change.standard_error) else "unknown"
        sentence = (
            f"{words} {100 * change.value:.1f}{unit} (standard error {error}), "
            f"evaluation.{setting} allows {100 * bound:.1f}{unit}"
        )
        if change.low > bound:
            reasons.append(sentence)
        elif change.value > bound:
            warnings.append(f"{sentence}: not refused, for it is beyond by less than two standard errors")
    return Gate(not reasons, _improved(findings), _comparison(findings), tuple(reasons), tuple(warnings))


def _improved(findings: Findings) -> bool:
    change = findings.accuracy_change.value
    return change > 0 or (change == 0 and findings.margin > findings.margin_previous)


def _comparison(findings: Findings) -> str:
    change = findings.accuracy_change
    if math.isnan(change.value):
        return "no held-out pair could be compared"
    if change.value == 0:
        return (
            f"accuracy {findings.accuracy:.1%} as before, "
            f"margin {findings.margin_previous:+.3g} -> {findings.margin:+.3g} nats"
        )
    return (
        f"accuracy {findings.accuracy_previous:.1%} -> {findings.accuracy:.1%} "
        f"({100 * change.value:+.1f} +/- {100 * change.standard_error:.1f} points)"
    )


def _degenerate(findings: Findings) -> list[str]:
    reasons = []
    if findings.num_non_finite_pairs:
        reasons.append(f"log-probs of {findings.num_non_finite_pairs} held-out pairs are not finite numbers")
    if findings.share_empty > 0.5:
        reasons.append(f"{findings.share_empty:.0%} of its answers are empty")
    if findings.num_answers >= _FEWEST_PROMPTS_TO_COMPARE and findings.num_distinct_answers == 1:
        reasons.append(f"it gives one and the same answer to all {findings.num_answers} prompts")
    if findings.share_cut == 1 and findings.share_cut_previous <= 0.5:
        reasons.append(
            f"none of its answers ends before the token limit ({1 - findings.share_cut_previous:.0%} of the previous "
            "policy's do)"
        )
    return reasons


def _limits_of_measurement(findings: Findings) -> list[str]:
    warnings = []
    if math.isnan(findings.accuracy_change.value):
        warnings.append("no held-out pair could be scored: the change of accuracy is unknown")
    if not findings.num_answers:
        warnings.append("no answers were sampled: the growth in length is unknown")
    elif math.isnan(findings.length_growth.value):
        warnings.append("the previous policy's answers are all empty: the growth in length is unknown")
    elif max(findings.share_cut, findings.share_cut_previous) > 0.5:
        warnings.append(
            f"the limit of tokens cuts {findings.share_cut:.0%} of the answers "
            f"({findings.share_cut_previous:.0%} of the previous policy's): longer ones would not show as longer"
        )
    return warnings

"""Whether a candidate is accepted, and whether it is better than the incumbent: pure functions of what was measured.

Accepted means that the run may go on with it: no guard is broken, against the policy before it. Better means that what
decides lies above the incumbent's by more than chance: the win rate and the one at equal lengths, or, without a judge,
the change of held-out accuracy. Promotable is a candidate that is better and whose guards all hold, against the
incumbent too. Each rule is an object that says in a sentence what it found.

Where the incumbent is of another run, the policy before the candidate is not: a run that is young and sound goes on,
however far it still is from a model that several iterations made.

A bound of the settings is a limit on the true change. Measured changes are noisy, the more so on few pairs and prompts:
a guard is broken when the whole 95 % interval lies beyond its bound. A change beyond it by less is no reason to end a
run, and none to promote: the remedy is more held-out pairs or sample prompts, not a coin toss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dice_core.evaluation.estimates import UNKNOWN, Estimate, for_all_of
from dice_core.evaluation.settings import EvaluationConfig

Kind = Literal["gain", "guard", "evidence"]
Outcome = Literal["better", "not shown", "worse"]
BETTER: Outcome = "better"
NOT_SHOWN: Outcome = "not shown"
WORSE: Outcome = "worse"

# An answer to every prompt that is one and the same text is only telling from so many prompts on.
_FEWEST_PROMPTS_TO_COMPARE = 4
_MOST_EMPTY = 0.5


@dataclass(frozen=True)
class Judged:
    """What a judge said of the candidate's and the incumbent's answers to the same prompts."""

    win_rate: Estimate
    length_controlled: Estimate
    share_parsed: float
    """Of the comparisons that the judge was asked for."""


@dataclass(frozen=True)
class Changes:
    """The candidate against another model, on the same held-out pairs and prompts."""

    accuracy: Estimate
    """Held-out reward accuracy, the candidate's minus the other's."""
    length: Estimate
    """Mean characters of an answer relative to the other's, minus 1."""
    cut: Estimate
    """Share of answers that the limit of tokens ends, the candidate's minus the other's."""
    share_cut: float
    """The other's."""


NO_CHANGES = Changes(UNKNOWN, UNKNOWN, UNKNOWN, math.nan)
"""Nothing was measured."""


@dataclass(frozen=True)
class Findings:
    """What the gate looks at, of the candidate unless it says otherwise. Shares are of the sampled answers."""

    accuracy: float
    """Held-out reward accuracy against the run's base reference."""
    accuracy_incumbent: float
    """That of the incumbent, against the same reference on the same pairs."""
    incumbent: Changes
    """Against the incumbent."""
    drift: Estimate
    """From the first policy, in nats per token of the answers."""
    share_cut: float
    """Ended by the limit of tokens."""
    share_empty: float
    num_answers: int
    num_distinct_answers: int
    num_pairs: int
    """Held-out pairs that both models scored."""
    previous: Changes | None = None
    """Against the policy before the candidate; None: it is the incumbent."""
    num_prompts: int = 0
    """That a judge compared."""
    judged: Judged | None = None
    """None: there is no judge."""
    detectable_difference: float = math.nan
    num_needed: int = 0
    """For evaluation.wanted_difference; 0: not known."""
    num_non_finite_pairs: int = 0
    """Held-out pairs for which the candidate gave a log-prob that is not a number."""
    broken_weights: str = ""
    """Why nothing can be sampled from the candidate."""


@dataclass(frozen=True)
class Rule:
    """A rule of the gate, and what it found."""

    name: str
    what: str
    """What is measured, in words."""
    kind: Kind
    """gain: all of them make a candidate better. guard: broken, it refuses one. evidence: only bars its promotion."""
    value: float | None
    low: float | None
    high: float | None
    """The 95 % interval, of a gain that of all evaluation.num_candidates together; None where it is not known, or the
    value is exact."""
    bound: float
    """The low end of a gain lies above it; the value of a guard is not beyond it, that of evidence not below."""
    passed: bool | None
    """None: not shown either way."""
    sentence: str


@dataclass(frozen=True)
class Gate:
    """The decision, and the rules that made it."""

    outcome: Outcome
    accepted: bool
    promotable: bool
    reason: str
    """One line for manifests and logs."""
    rules: tuple[Rule, ...]
    power: str = ""
    """What so many prompts or pairs can show, in a line; empty: not known."""
    warnings: tuple[str, ...] = ()
    """What a person should know of an accepted candidate too."""

    def rule(self, name: str) -> Rule:
        """Return a rule by name."""
        return next(rule for rule in self.rules if rule.name == name)


def decide(findings: Findings, config: EvaluationConfig) -> Gate:
    """Accept or refuse a candidate, and say whether it is better than the incumbent.

    Args:
        findings: what was measured.
        config: the bounds.
    """
    gains, guards = _gains(findings, config.num_candidates), _guards(findings, config)
    evidence = _evidence(findings, config)
    rules = (*gains, *evidence, *guards)
    outcome = _outcome(gains)
    broken = [rule.sentence for rule in guards if rule.passed is False]
    barred = [rule.sentence for rule in (*evidence, *guards) if not rule.passed]
    promotable, power = outcome == BETTER and not barred, _power(findings, config)
    reason = "; ".join(broken) if broken else _verdict(outcome, gains, barred, power)
    return Gate(outcome, not broken, promotable, reason, rules, power, (*_unsure(guards), *_limits(findings)))


def _outcome(gains: Sequence[Rule]) -> Outcome:
    """Return better where all gains are above their bound, worse where one is below and none above."""
    above = [rule.passed for rule in gains]
    if all(above):
        return BETTER
    below = [rule.high is not None and rule.high < rule.bound for rule in gains]
    return WORSE if any(below) and not any(above) else NOT_SHOWN


def _verdict(outcome: Outcome, gains: Sequence[Rule], barred: Sequence[str], power: str) -> str:
    measured = ", ".join(rule.sentence for rule in gains)
    if outcome == BETTER and barred:
        return f"{outcome}, not promoted: {'; '.join(barred)} ({measured})"
    return f"{outcome}: {measured}" + (f"; {power}" if outcome != BETTER and power else "")


def _gains(findings: Findings, num_candidates: int) -> list[Rule]:
    """Return what decides, with intervals that hold for all candidates of which the best is taken."""
    judged, tried = findings.judged, "" if num_candidates == 1 else f", one of {num_candidates} candidates"
    if judged is None:
        change = for_all_of(findings.incumbent.accuracy, num_candidates)
        sentence = f"held-out accuracy {_percent(findings.accuracy_incumbent)} -> {_percent(findings.accuracy)}"
        sentence += f" ({_points(change.value, '+')}{_interval(change, 100, '+')}, {findings.num_pairs} pairs{tried})"
        if math.isnan(change.value):
            sentence = "held-out accuracy: no pair could be compared"
        return [_gain("accuracy_gain", "held-out reward accuracy, candidate - incumbent", change, 0, sentence)]
    win, equal = (for_all_of(found, num_candidates) for found in (judged.win_rate, judged.length_controlled))
    sizes = f", {findings.num_prompts:,} prompts{tried}"
    return [
        _gain(
            "win_rate",
            "preference for the candidate over the incumbent",
            win,
            0.5,
            f"win rate {_percent(win.value)}{_interval(win, 100, '', sizes)}",
        ),
        _gain(
            "length_controlled_win_rate",
            "the same, had both answered at one length",
            equal,
            0.5,
            f"at equal lengths {_percent(equal.value)}{_interval(equal, 100)}",
        ),
    ]


def _gain(name: str, what: str, estimate: Estimate, bound: float, sentence: str) -> Rule:
    is_above = True if estimate.low > bound else False if estimate.high < bound else None
    return Rule(name, what, "gain", *_numbers(estimate), bound, is_above, sentence)


def _guards(findings: Findings, config: EvaluationConfig) -> list[Rule]:
    if findings.previous is None:
        changes = _bounded_changes(findings, findings.incumbent, config)
    else:
        changes = _bounded_changes(findings, findings.previous, config, "the previous policy")
    drift = _bounded(
        "drift",
        "drift from the first policy is",
        findings.drift,
        config.max_drift_per_token,
        "max_drift_per_token",
        " nats per token",
        scale=1,
    )
    return [*_degenerate(findings), *changes, drift]


def _bounded_changes(
    findings: Findings, changes: Changes, config: EvaluationConfig, against: str = "", prefix: str = ""
) -> list[Rule]:
    """Return the guards of changes against a model, which is named where there are two."""
    drop = Estimate(-changes.accuracy.value, changes.accuracy.standard_error)
    more = f" against {against}" if against else ""
    cut = f"the token limit cuts {_percent(findings.share_cut)} of the answers ({against or 'the incumbent'}'s "
    rules = [
        _bounded(
            "accuracy_drop",
            f"held-out reward accuracy{more} fell by",
            drop,
            config.max_accuracy_drop,
            "max_accuracy_drop",
        ),
        _bounded(
            "length_growth",
            f"answers{more} grew by",
            changes.length,
            config.max_length_growth,
            "max_length_growth",
            "%",
        ),
        _bounded(
            "cut_answers",
            f"{cut}{_percent(changes.share_cut)}), more by",
            changes.cut,
            config.max_cut_growth,
            "max_cut_growth",
        ),
    ]
    return [replace(rule, name=prefix + rule.name) for rule in rules]


def _bounded(
    name: str, words: str, change: Estimate, bound: float, setting: str, unit: str = " points", *, scale: float = 100
) -> Rule:
    """Return the guard of a change that must not exceed a bound of the settings."""
    digits = ".1f" if scale == 100 else ".3g"
    passed = True if change.value <= bound else False if change.low > bound else None
    known = f"{words} {scale * change.value:{digits}}{unit}{_interval(change, scale, '', digits=digits)}"
    sentence = f"{known}, evaluation.{setting} allows {scale * bound:{digits}}{unit}"
    if math.isnan(change.value):
        sentence = f"{words} ?: not measured"
    return Rule(
        name, words.removesuffix(" by").removesuffix(" is"), "guard", *_numbers(change), bound, passed, sentence
    )


def _degenerate(findings: Findings) -> list[Rule]:
    """Return the guards against a broken candidate. They count, and have no interval."""
    rules = [
        _exact(
            "finite_log_probs",
            "held-out pairs whose log-probs are no finite numbers",
            findings.num_non_finite_pairs,
            0,
            f"log-probs of {findings.num_non_finite_pairs} held-out pairs are not finite numbers",
        )
    ]
    if findings.broken_weights:
        rules.insert(0, _exact("finite_weights", "weights that are no finite numbers", 1, 0, findings.broken_weights))
    if not findings.num_answers:
        return rules
    num, distinct = findings.num_answers, findings.num_distinct_answers
    fewest = 2 if num >= _FEWEST_PROMPTS_TO_COMPARE else 1
    alike = f"{distinct} different answers to {num} prompts"
    if distinct == 1:
        alike = f"it gives one and the same answer to all {num} prompts"
    return [
        *rules,
        _exact(
            "empty_answers",
            "share of empty answers",
            findings.share_empty,
            _MOST_EMPTY,
            f"{findings.share_empty:.0%} of its answers are empty",
        ),
        Rule("distinct_answers", "different answers", "guard", distinct, None, None, fewest, distinct >= fewest, alike),
    ]


def _exact(name: str, what: str, value: float, bound: float, sentence: str) -> Rule:
    return Rule(name, what, "guard", value, None, None, bound, value <= bound, sentence)


def _evidence(findings: Findings, config: EvaluationConfig) -> list[Rule]:
    """Return the rules that bar a promotion alone."""
    rules = []
    if findings.previous is not None:
        rules = _bounded_changes(findings, findings.incumbent, config, "the incumbent", "incumbent_")
    return [*_parsed(findings, config), *(replace(rule, kind="evidence") for rule in rules)]


def _parsed(findings: Findings, config: EvaluationConfig) -> list[Rule]:
    if findings.judged is None:
        return []
    parsed, bound = findings.judged.share_parsed, config.min_parsed_verdicts
    known = None if math.isnan(parsed) else parsed
    sentence = f"the judge gave a verdict on {_percent(parsed)} of the comparisons"
    sentence += f", evaluation.min_parsed_verdicts asks for {_percent(bound)}"
    passed = known is not None and known >= bound
    return [
        Rule("parsed_verdicts", "comparisons with a verdict", "evidence", known, None, None, bound, passed, sentence)
    ]


def _power(findings: Findings, config: EvaluationConfig) -> str:
    """Return what so many prompts or pairs can show, and how many more would."""
    if math.isnan(findings.detectable_difference):
        return ""
    num, unit = (findings.num_pairs, "held-out pairs") if findings.judged is None else (findings.num_prompts, "prompts")
    wanted = f"{100 * config.wanted_difference:.3g}"
    return (
        f"{num:,} {unit} show a difference of {_points(findings.detectable_difference)} in 80 % of runs, "
        f"{wanted} points would take {findings.num_needed:,}"
    )


def _unsure(guards: Sequence[Rule]) -> list[str]:
    return [
        f"{rule.sentence}: not refused, for it is beyond by less than chance; not promoted either"
        if rule.value is not None
        else rule.sentence
        for rule in guards
        if rule.passed is None
    ]


def _limits(findings: Findings) -> list[str]:
    if not findings.num_answers:
        return ["no answers were sampled"]
    if max(findings.share_cut, findings.incumbent.share_cut) > 0.5:
        return [
            f"the limit of tokens cuts {findings.share_cut:.0%} of the answers "
            f"({findings.incumbent.share_cut:.0%} of the incumbent's): longer ones would not show as longer"
        ]
    return []


def _numbers(estimate: Estimate) -> tuple[float | None, float | None, float | None]:
    """Return value, low and high; None where one is not known."""
    return tuple(  # type: ignore[return-value]
        number if math.isfinite(number) else None for number in (estimate.value, estimate.low, estimate.high)
    )


def _percent(value: float) -> str:
    return "?" if math.isnan(value) else f"{100 * value:.1f} %"


def _points(value: float, sign: str = "") -> str:
    return "?" if math.isnan(value) else f"{100 * value:{sign}.1f} points"


def _interval(estimate: Estimate, scale: float, sign: str = "", more: str = "", *, digits: str = ".1f") -> str:
    if not math.isfinite(estimate.low):
        return f" (interval unknown{more})"
    return f" ({scale * estimate.low:{sign}{digits}} to {scale * estimate.high:{sign}{digits}}{more})"

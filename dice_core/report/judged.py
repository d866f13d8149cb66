"""A judge's verdicts, grouped by what the answers are about and by how much longer one is, and the most disputed. Pure.

Reads the samples of evaluation.json (evaluation/result.py has their form).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LENGTH_GROUPS = (
    ("shorter by more than 25%", -0.25),
    ("shorter by 5 to 25%", -0.05),
    ("about as long (within 5%)", 0.05),
    ("longer by 5 to 25%", 0.25),
    ("longer by more than 25%", math.inf),
)
"""Names, and the greatest relative difference in characters that belongs to each."""
_MOST_CATEGORIES = 12


def groups_of_verdicts(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return wins, ties and losses of the candidate, by length difference and by category.

    Args:
        samples: those without a verdict are left out.

    Returns:
        `verdicts_by_length` and `verdicts_by_category`: a list of {group, win, tie, loss} each; empty where nothing was
        judged, or no sample has a category.
    """
    judged = [sample for sample in samples if preference(sample) is not None]
    by_length = {group: [s for s in judged if _length_group(s) == group] for group, _ in _LENGTH_GROUPS}
    categories = sorted({str(sample["category"]) for sample in judged if sample.get("category")})
    by_category = {group: [s for s in judged if s.get("category") == group] for group in categories}
    largest = sorted(by_category, key=lambda group: -len(by_category[group]))[:_MOST_CATEGORIES]
    return {
        "verdicts_by_length": [_counts(group, found) for group, found in by_length.items()] if judged else [],
        "verdicts_by_category": [_counts(group, by_category[group]) for group in largest],
    }


def preference(sample: Mapping[str, Any]) -> float | None:
    """Return the judge's preference for the candidate, mean of both orders, 0 to 1; None where it said nothing."""
    verdict = sample.get("verdict") or {}
    found: float | None = verdict.get("preference")
    return found


def _length_group(sample: Mapping[str, Any]) -> str:
    new, old = len(sample["policy"]["text"]), len(sample["incumbent"]["text"])
    difference = (new - old) / old if old else math.inf if new else 0.0
    return next(group for group, most in _LENGTH_GROUPS if difference <= most)


def _counts(group: str, samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    words = [_word(sample) for sample in samples]
    return {"group": group, **{word: words.count(word) for word in ("win", "tie", "loss")}}


def _word(sample: Mapping[str, Any]) -> str:
    """Return what a verdict counts as; one that changes with the order is a tie, as in evaluation/result.py."""
    value = preference(sample)
    if value is None or value == 0.5 or sample["verdict"].get("flipped"):
        return "tie"
    return "win" if value > 0.5 else "loss"


def most_disputed(samples: Sequence[Mapping[str, Any]], num_most: int) -> list[Mapping[str, Any]]:
    """Return the samples on which the judge contradicts itself, or the implicit reward, the most.

    Args:
        samples: of an evaluation.
        num_most: how many to return; those without any dispute are left out.
    """
    found = [(dispute(sample), index) for index, sample in enumerate(samples)]
    disputed = sorted((-value, index) for value, index in found if value is not None and value > 0)
    return [samples[index] for _, index in disputed[:num_most]]


def dispute(sample: Mapping[str, Any]) -> float | None:
    """Return how much is in dispute about a sample, 0 to 1; None where it was not judged.

    The largest of two: how far the judge's preference moves with the order of the answers, and, where judge and
    implicit reward prefer different answers, how far their preferences are apart (a reward difference of d nats is a
    preference of sigmoid(d), after Bradley and Terry).
    """
    value, verdict = preference(sample), sample.get("verdict") or {}
    if value is None:
        return None
    between_orders = abs(verdict["candidate_first"] - verdict["candidate_second"])
    difference = reward_difference(sample)
    if difference is None or difference * (value - 0.5) >= 0:
        return float(between_orders)
    implied = 1 / (1 + math.exp(-max(-700.0, min(700.0, difference))))
    return max(float(between_orders), abs(value - implied))


def reward_difference(sample: Mapping[str, Any]) -> float | None:
    """Return the candidate's implicit reward minus the incumbent's, nats; None where one is not known."""
    new, old = sample["policy"].get("reward"), sample["incumbent"].get("reward")
    return None if new is None or old is None else new - old

"""What a judge is asked and what it says, as plain values. Pure: which judge it was, judging.py knows.

A preference is a number from 0 to 1: how likely the judge finds the candidate's answer better. Judges prefer what they
read first, so each comparison is judged in both orders and the mean counts. What a judge did not say is missing: never
a win, a loss or a tie.
"""

import math
from dataclasses import dataclass

# Preferences lie on this grid: one minus a preference, and the mean of two, are then exact.
_GRID = 2.0**40


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt: of the candidate, the new policy, and of the incumbent, the model that it is to beat."""

    prompt_id: str
    prompt: str
    candidate: str
    incumbent: str

    def swapped(self) -> "Comparison":
        """Return the same comparison with the models in each other's place."""
        return Comparison(self.prompt_id, self.prompt, self.incumbent, self.candidate)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a comparison: its preference for the candidate, from 0 to 1, in each order.

    A judge that reads one answer at a time, such as a reward model, has no order: it says the same twice.
    """

    candidate_first: float | None
    """When the candidate's answer was shown first; None: missing (a failure, a refusal, a malformed answer)."""
    candidate_second: float | None
    """When it was shown second."""

    @property
    def preference(self) -> float | None:
        """The mean of both orders; None where one of them is missing."""
        if self.candidate_first is None or self.candidate_second is None:
            return None
        return (self.candidate_first + self.candidate_second) / 2

    @property
    def flipped(self) -> bool | None:
        """Whether the two orders prefer different answers; None where one of them is missing."""
        if self.candidate_first is None or self.candidate_second is None:
            return None
        return (self.candidate_first - 0.5) * (self.candidate_second - 0.5) < 0

    def swapped(self) -> "Verdict":
        """Return what the same judge says with the models in each other's place."""
        return Verdict(
            *(None if value is None else 1 - value for value in (self.candidate_second, self.candidate_first))
        )


TIE = Verdict(0.5, 0.5)
MISSING = Verdict(None, None)


@dataclass(frozen=True)
class Response:
    """An answer to a prompt, to be judged alone."""

    prompt_id: str
    prompt: str
    response: str


def preference_of_rewards(candidate: float, incumbent: float) -> float | None:
    """Return the preference for the candidate that two rewards mean: sigmoid of their difference (Bradley and Terry).

    Args:
        candidate: reward or log-probability, in nats.
        incumbent: of the other answer, on the same scale.

    Returns:
        None where the difference is no number, as of two infinities.
    """
    difference = candidate - incumbent
    if math.isnan(difference):
        return None
    # Of the side above one half: exp cannot overflow, and what is swapped is one minus it to the last bit.
    above = round(_GRID / (1 + math.exp(-abs(difference)))) / _GRID
    return above if difference >= 0 else 1 - above

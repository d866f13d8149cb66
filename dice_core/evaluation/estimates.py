"""Measured numbers with standard errors and 95 % intervals: shares, means, changes on the same prompts. Pure numpy."""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_NORMAL_95 = 1.959963984540054
"""Standard errors on either side of a value that hold 95 % of a normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A measured number and the standard error of it; infinite where too little was measured to know one."""

    value: float
    standard_error: float
    interval: tuple[float, float] | None = None
    """The 95 % interval where it was measured itself; else the normal one."""

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval; minus infinity where it is unknown."""
        return self._end(0)

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval; infinity where it is unknown."""
        return self._end(1)

    def _end(self, side: int) -> float:
        if self.interval is not None:
            return self.interval[side]
        sign = 2 * side - 1
        known = math.isfinite(self.value) and math.isfinite(self.standard_error)
        return self.value + sign * _NORMAL_95 * self.standard_error if known else sign * math.inf


def for_all_of(estimate: Estimate, num: int) -> Estimate:
    """Return an estimate whose interval holds together with those of others: in 95 % of cases for all of them.

    Bonferroni: each may miss in 5 % / num of cases. Both arms of the interval grow as those of a normal distribution
    do: of resampling, the far ends of a thousand values would say less.

    Args:
        estimate: of one of them.
        num: how many there are, it included.
    """
    if num == 1 or not math.isfinite(estimate.low) or not math.isfinite(estimate.high):
        return estimate
    factor = NormalDist().inv_cdf(1 - 0.025 / num) / _NORMAL_95
    ends = [estimate.value + factor * (end - estimate.value) for end in (estimate.low, estimate.high)]
    return replace(estimate, interval=(ends[0], ends[1]))


UNKNOWN = Estimate(math.nan, math.inf)
"""Nothing was measured."""


def hits(margins: ArrayLike) -> Floats:
    """Return 1 for a positive margin, 0.5 for a tie, 0 for a negative one, as `training/loss.py` does."""
    return (np.sign(np.asarray(margins, dtype=np.float64)) + 1) / 2


def accuracy(margins: ArrayLike) -> Estimate:
    """Estimate the share of pairs whose chosen response has the higher reward; ties count half.

    Standard error and interval are Agresti and Coull's (two hits and two misses added): the plain binomial error is 0
    when all pairs agree, which on sixteen pairs claims far too much. The interval lies about their share, between 0
    and 1.

    Args:
        margins: reward(chosen) - reward(rejected). Shape: (pairs,)
    """
    right = hits(margins)  # (pairs,)
    if not right.size:
        return UNKNOWN
    share = (right.sum() + 2) / (right.size + 4)
    error = math.sqrt(share * (1 - share) / (right.size + 4))
    interval = max(0.0, share - _NORMAL_95 * error), min(1.0, share + _NORMAL_95 * error)
    return Estimate(float(right.mean()), error, (float(interval[0]), float(interval[1])))


def accuracy_change(margins: ArrayLike, previous_margins: ArrayLike) -> Estimate:
    """Estimate how much the accuracy changed on the same pairs.

    The standard error is Agresti and Min's (2005) for matched pairs, a half added to each of the four cells: pairs on
    which both policies agree cancel out, and no change seen on few pairs is not certainty.

    Args:
        margins: of the new policy. Shape: (pairs,)
        previous_margins: of the other one, in the same order. Shape: (pairs,)
    """
    change = hits(margins) - hits(previous_margins)  # (pairs,)
    if not change.size:
        return UNKNOWN
    size = change.size + 2
    variance = (np.square(change).sum() + 1 - change.sum() ** 2 / size) / size**2
    return Estimate(float(change.mean()), math.sqrt(variance))


def mean(values: ArrayLike) -> Estimate:
    """Estimate the mean of values. Of paired differences it is the paired change."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return UNKNOWN
    error = array.std(ddof=1) / math.sqrt(array.size) if array.size > 1 else math.inf
    return Estimate(float(array.mean()), float(error))


def ratio(values: ArrayLike, sizes: ArrayLike) -> Estimate:
    """Estimate sum(values) / sum(sizes), such as nats per token, from independent answers.

    The standard error is that of a ratio of paired means: the spread of values - ratio * sizes.

    Args:
        values: a sum over each answer. Shape: (prompts,)
        sizes: non-negative, such as the tokens of each answer. Shape: (prompts,)

    Returns:
        Not a number, with an infinite error, where the sizes add up to 0.
    """
    total, size = np.asarray(values, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if not size.size or not size.mean():
        return UNKNOWN
    quotient = total.mean() / size.mean()
    spread = mean(total - quotient * size).standard_error
    return Estimate(float(quotient), float(spread / size.mean()))


def growth(values: ArrayLike, previous_values: ArrayLike) -> Estimate:
    """Estimate mean(values) / mean(previous_values) - 1 on the same prompts, both of them non-negative.

    Args:
        values: such as the lengths of the new policy's answers. Shape: (prompts,)
        previous_values: the same of the other policy, in the same order. Shape: (prompts,)

    Returns:
        Not a number, with an infinite error, where the previous mean is 0 or nothing was measured.
    """
    quotient = ratio(values, previous_values)
    return Estimate(quotient.value - 1, quotient.standard_error)

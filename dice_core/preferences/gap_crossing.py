"""The length penalty at which the mean length gap crosses 0, found by looking at the gap alone.

For the rules of selection whose steps no envelope gives (`length_penalty.py` has the exact steps of best-worst):

- margin: which prompts are kept depends on the penalty, and any two of them may change places. The gap still never
  increases: a prompt's margin is the difference of an upper and a lower envelope of lines, hence convex in the penalty;
  the sum of the k largest of convex functions is convex, and the gap is its slope with the sign turned.
- mu-2sigma: the rejected response can come back to a shorter one as the penalty grows. The gap falls on the whole, and
  of several crossings the one nearest to 0 is meant, as far as the steps of the search tell two apart.
"""

from collections.abc import Callable, Iterator

import numpy as np

from dice_core.preferences.selection import ScoredPrompts

_FIRST_STEP, _GROWTH = 1 / 16, 1.5
# Of a step: a millionth of a character's gap, far below what one prompt's pair changes it by.
_NUM_HALVINGS = 24


def crossing_length_penalty(grouped: ScoredPrompts) -> float:
    """Return a penalty at which the mean length gap is 0, or changes its sign.

    Looked for on the side that mends the gap at 0: a positive penalty where chosen responses are longer, a negative one
    where they are shorter. The search goes outwards in growing steps to the first change of sign and halves that step.
    Of all penalties that it tries it returns the one with the smallest absolute gap, of equals that nearest to 0; one
    at which a tie costs a prompt its pair comes last.
    """
    tried: dict[float, tuple[int, float]] = {}

    def gap(length_penalty: float) -> float:
        tried[length_penalty] = grouped.measure(length_penalty)[::-1]
        return tried[length_penalty][1]

    side = float(np.sign(gap(0.0)))
    if side:
        _search(gap, side, grouped)
    return min(tried, key=lambda value: (tried[value][0], abs(tried[value][1]), abs(value)))


def _search(gap: Callable[[float], float], side: float, grouped: ScoredPrompts) -> None:
    """Try penalties on one side, until one step of no width is left in which the gap changes its sign."""
    inner = 0.0
    for outer in _outwards(grouped):
        if gap(side * outer) * side <= 0:
            break
        inner = outer
    else:
        return
    for _ in range(_NUM_HALVINGS):
        middle = (inner + outer) / 2
        if gap(side * middle) * side <= 0:
            outer = middle
        else:
            inner = middle


def _outwards(grouped: ScoredPrompts) -> Iterator[float]:
    """Yield penalties from near 0 to one beyond which nothing changes: all prompts prefer their shortest response."""
    typical = typical_length_penalty(grouped)
    if not typical:
        return
    # Lengths are whole: two that differ do so by 1 at least.
    last = 2 * max(float(np.ptp(block.rewards, axis=1).max()) for block in grouped.blocks)
    point = min(last, _FIRST_STEP * typical)
    while point < last:
        yield point
        point *= _GROWTH
    yield last


def typical_length_penalty(grouped: ScoredPrompts) -> float:
    """Return the size of penalties that matter: what rewards differ by, over what lengths differ by; 0: none does."""
    rewards, lengths = (
        sum(float(np.ptp(getattr(block, name), axis=1).sum()) for block in grouped.blocks)
        for name in ("rewards", "lengths")
    )
    return rewards / lengths if lengths else 0.0

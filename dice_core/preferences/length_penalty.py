"""The length penalty that makes chosen and rejected responses equally long on average (DICE Eq. 6).

Every response of a prompt is a line over the penalty alpha: reward - alpha * length. As alpha grows, the best response
moves along the upper envelope of the prompt's lines, to shorter ones, and the worst along the lower envelope, to longer
ones. So best-worst's mean signed gap length(chosen) - length(rejected) is a non-increasing step function of alpha, and
its steps are the corners of the envelopes: no sweep with a new pairing at each value is needed.

With the other rules of selection the steps are not known beforehand: `gap_crossing.py` looks for the crossing.

Upstream (generate_lc_paired_set.py) sweeps a grid instead, which misses penalties below 0, above 1 and between points.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dice_core.preferences.gap_crossing import crossing_length_penalty, typical_length_penalty
from dice_core.preferences.selection import Block, ScoredPrompts, group_scores
from dice_core.preferences.settings import PairingConfig

Floats = NDArray[np.float64]

# Upstream's alpha_range as numpy rounds it: the point printed 0.023 is this array's float.
GRID = np.arange(0.0, 1.0, 0.001)

_CURVE_POINTS = 50
# Where each point is a pass over all scores.
_MEASURED_CURVE_POINTS = 20


@dataclass(frozen=True)
class LengthPenalty:
    """A length penalty and what it does to the lengths.

    Attributes:
        value: unit of the reward per unit of length. For the implicit reward that is nats, without beta, and
            `reward.paper_length_penalty` gives the paper's. For others it has no counterpart in the paper: a reward
            model's raw score, or a judge's grade, per unit of length.
        scores: what it was chosen for.
        steps: of these, where choosing needed them.
    """

    value: float
    scores: ScoredPrompts = field(repr=False)
    steps: "GapSteps | None" = field(repr=False)

    @cached_property
    def gap(self) -> float:
        """Mean of length(chosen) - length(rejected) at that value, signed, over the prompts that keep their pairs."""
        return self.scores.mean_length_gap(self.value)

    @cached_property
    def unpenalised_gap(self) -> float:
        """The same at 0."""
        return self.scores.mean_length_gap(0.0)

    @cached_property
    def curve(self) -> tuple[Floats, Floats]:
        """Penalties [points] ascending, with 0 and the value among them, and the gaps [points] there."""
        if self.scores.has_envelopes:
            steps = self.steps or gap_steps(self.scores)
            penalties = _curve_points(self.value, steps.spread(), _CURVE_POINTS)
            gaps = steps.at(penalties) / len(self.scores.prompt_ids)
        else:
            penalties = _curve_points(self.value, typical_length_penalty(self.scores), _MEASURED_CURVE_POINTS)
            gaps = np.array([self.scores.mean_length_gap(penalty) for penalty in penalties])
        gaps[penalties == 0], gaps[penalties == self.value] = self.unpenalised_gap, self.gap
        return penalties, gaps


@dataclass(frozen=True)
class GapSteps:
    """The summed length gap as a function of the penalty: gaps[i] holds between corners[i - 1] and corners[i].

    Attributes:
        corners: [steps] ascending penalties.
        gaps: [steps + 1] sums over prompts, non-increasing.
    """

    corners: Floats
    gaps: Floats

    def at(self, length_penalties: Floats) -> Floats:
        """Return the summed gap at each penalty; at a corner, the one to its right."""
        return self.gaps[np.searchsorted(self.corners, length_penalties, side="right")]

    def spread(self) -> float:
        """Return how far apart the quartiles of the corners are: where most of the fall is."""
        if not len(self.corners):
            return 0.0
        first, last = self.corners[[len(self.corners) // 4, 3 * len(self.corners) // 4]]
        return float(last - first)


def choose_length_penalty(
    scores: ScoredPrompts | pa.Table | Iterable[pa.Table], config: PairingConfig
) -> LengthPenalty:
    """Choose the length penalty as the settings say: `exact`, `grid` or a number.

    Args:
        scores: SCORES tables, or `group_scores` of them where the caller has that already.
        config: length_penalty is read, and what `group_scores` reads.

    Raises:
        PairError: as `group_scores`.
    """
    grouped = scores if isinstance(scores, ScoredPrompts) else group_scores(scores, config)
    steps = None
    if config.length_penalty == "exact" and grouped.has_envelopes:
        steps = gap_steps(grouped)
        value = exact_length_penalty(grouped, steps)
    elif config.length_penalty == "exact":
        value = crossing_length_penalty(grouped)
    elif config.length_penalty == "grid":
        value = grid_length_penalty(grouped) if grouped.has_envelopes else sweep_length_penalty(grouped)
    else:
        value = float(config.length_penalty)
    return LengthPenalty(value, grouped, steps)


def grid_length_penalty(grouped: ScoredPrompts) -> float:
    """Return the penalty that upstream's sweep returns, by bisection.

    Upstream tries GRID in order, stops at the first value worse (in absolute mean gap) than the best so far, and takes
    the first of the best. The gap never increases, so its absolute value falls to the sign change and rises after it:
    the winner is the first point at or below 0, or the first point of the step before it.
    """
    seen: dict[int, float] = {}

    def gap(index: int) -> float:
        if index not in seen:
            seen[index] = grouped.mean_length_gap(GRID[index])
        return seen[index]

    def first_at_most(limit: float) -> int:
        low, high = 0, len(GRID)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if gap(middle) <= limit else (middle + 1, high)
        return low

    crossed = first_at_most(0.0)
    if crossed == 0 or (crossed < len(GRID) and -gap(crossed) < gap(crossed - 1)):
        return float(GRID[crossed])
    return float(GRID[first_at_most(gap(crossed - 1))])


def sweep_length_penalty(grouped: ScoredPrompts) -> float:
    """Return the penalty that upstream's sweep returns, by that sweep: the gap may rise on its way down."""
    best = (math.inf, 0.0)
    for value in GRID:
        gap = abs(grouped.mean_length_gap(float(value)))
        if gap > best[0]:
            break
        best = min(best, (gap, float(value)))
    return best[1]


def exact_length_penalty(grouped: ScoredPrompts, steps: GapSteps) -> float:
    """Return a penalty at which the absolute mean gap is as small as any penalty makes it.

    Such penalties fill an interval between two corners, and any of them selects lengths equally well. Reported is 0
    where 0 is one of them, the interval's midpoint otherwise (as far as can be from a tie); of two intervals equally
    good the lower, as in upstream's sweep. May be negative, or above 1.

    At a corner that prompts share, ties can leave a gap smaller than on both sides, so the corner is a candidate too;
    but not where a tie costs a prompt its pair. Candidates are compared by what selection will really do at them.
    """
    corners = _merge_close(steps.corners, grouped)
    if not len(corners):
        return 0.0  # each prompt's responses are equally long: no penalty changes anything
    middles = (corners[:-1] + corners[1:]) / 2
    crossed = int(np.searchsorted(-steps.at(middles), 0.0))  # the first middle with a gap of at most 0
    candidates = [0.0, *middles[max(crossed - 1, 0) : crossed + 1], *corners[crossed : crossed + 1]]
    return float(min(candidates, key=lambda value: (grouped.num_tied(value), abs(grouped.mean_length_gap(value)))))


def gap_steps(grouped: ScoredPrompts) -> GapSteps:
    """Return best-worst's summed length gap as a step function of the penalty, from the envelopes of all prompts."""
    corners, jumps = [np.empty(0)], [np.empty(0)]
    highest = 0.0
    for block in grouped.blocks:
        highest += float((block.lengths.max(axis=1) - block.lengths.min(axis=1)).sum())
        for block_corners, block_jumps in _block_corners(block):
            corners.append(block_corners)
            jumps.append(block_jumps)
    positions, steps = np.concatenate(corners), np.concatenate(jumps)
    order = np.argsort(positions)
    return GapSteps(positions[order], np.concatenate([[highest], highest + np.cumsum(steps[order])]))


def _block_corners(block: Block) -> Iterator[tuple[Floats, Floats]]:
    yield from _envelope_corners(block.rewards, block.lengths)
    # The lower envelope is the upper one of the mirrored lines; mirrored lengths give the jumps the gap's sign.
    yield from _envelope_corners(-block.rewards, -block.lengths)


def _envelope_corners(rewards: Floats, lengths: Floats) -> Iterator[tuple[Floats, Floats]]:
    """Walk the upper envelope of each prompt's lines reward - alpha * length, for alpha from -inf to +inf.

    From the line of the moment, the next corner is the nearest crossing with a shorter one (gift wrapping). A pass
    finds one corner of every prompt; prompts that have arrived at their shortest line leave.

    Args:
        rewards: [prompts, responses].
        lengths: [prompts, responses].

    Yields:
        (corners, jumps) of each pass: penalties, and the change of length there, which is negative.
    """
    length = lengths.max(axis=1)
    reward = np.where(lengths == length[:, None], rewards, -np.inf).max(axis=1)
    while len(length):
        shorter = length[:, None] - lengths
        crossings = np.full_like(rewards, np.inf)
        np.divide(reward[:, None] - rewards, shorter, out=crossings, where=shorter > 0)
        column = crossings.argmin(axis=1)
        rows = np.arange(len(column))
        corner = crossings[rows, column]
        alive = np.flatnonzero(corner < np.inf)
        column, previous = column[alive], length[alive]
        rewards, lengths = (rewards, lengths) if len(alive) == len(rows) else (rewards[alive], lengths[alive])
        rows = rows[: len(alive)]
        reward, length = rewards[rows, column], lengths[rows, column]
        yield corner[alive], length - previous


def _merge_close(corners: Floats, grouped: ScoredPrompts) -> Floats:
    """Drop a corner that rounding cannot tell from the one before it: nothing real lies between them."""
    rewards = max(float(np.abs(block.rewards).max()) for block in grouped.blocks)
    lengths = max(float(block.lengths.max()) for block in grouped.blocks)
    # Lengths are whole, so a rounding error of reward - alpha * length shifts a crossing by no more than itself.
    rounding = np.finfo(np.float64).eps * (rewards + np.abs(corners) * lengths)
    return corners[np.diff(corners, prepend=-np.inf) > 4 * rounding]


def _curve_points(value: float, spread: float, num_points: int) -> Floats:
    """Return about so many penalties around 0 and the value, wide enough to show how the gap falls."""
    margin = max(abs(value), spread) / 2 or 1.0
    even = np.linspace(min(0.0, value) - margin, max(0.0, value) + margin, num_points - 2)
    return np.unique(np.concatenate([even, [0.0, value]]))

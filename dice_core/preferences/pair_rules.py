"""Which two responses of a prompt become its pair, and which prompts keep theirs: the rules of `pairing.selection`.

Pure arithmetic on length-regularised rewards. Ties go to the first, which is the lowest sample_index.

- best-worst: the highest against the lowest. DICE, and upstream.
- mu-2sigma: the highest against the one nearest to two standard deviations below the mean. "Finding the Sweet Spot"
  (arXiv 2502.16825) compares 21 such pairings: with many responses the lowest is degenerate, and learning to avoid it
  teaches little. For normal rewards the lowest of 16 lies at about mu - 1.8 sigma, so there the two rules differ
  little; they part from 32 responses on, or where a reward has outliers.
- margin: best-worst, of the share of prompts with the largest margins. "Less is More" (arXiv 2502.14560) trains each
  iteration on the quarter with the largest margins, as small ones are mostly noise of the reward; SeRA (arXiv
  2410.09362) selects by the implicit reward's margin likewise. The opposite, small margins (arXiv 2508.04149), is for
  pairs whose labels are known to be right. Ours are not.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NUM_DEVIATIONS = 2.0


def best_and_worst(values: Floats) -> tuple[Ints, Ints]:
    """Return the columns [prompts] of the highest and of the lowest value.

    Args:
        values: [prompts, responses] length-regularised rewards.
    """
    return values.argmax(axis=1), values.argmin(axis=1)


def best_and_two_deviations_below(values: Floats, sizes: Ints) -> tuple[Ints, Ints]:
    """Return the columns [prompts] of the highest value, and of the one nearest to mean - 2 standard deviations.

    Both can be one column: where all values are equal, and where an outlier so far below makes the highest the nearest.

    Args:
        values: [prompts, responses] length-regularised rewards; columns from a prompt's size on are no responses.
        sizes: [prompts] how many responses each has.
    """
    is_response = np.arange(values.shape[1]) < sizes[:, None]  # (prompts, responses)
    whole = bool(is_response.all())
    means = (values if whole else np.where(is_response, values, 0.0)).sum(axis=1) / sizes  # (prompts,)
    below = values - means[:, None]
    if not whole:
        below[~is_response] = 0.0
    deviations = np.sqrt(np.einsum("pr,pr->p", below, below) / sizes)
    below += _NUM_DEVIATIONS * deviations[:, None]
    distances = np.abs(below, out=below)
    if not whole:
        distances[~is_response] = np.inf
    return values.argmax(axis=1), distances.argmin(axis=1)


def largest_margins(margins: Floats, share: float) -> NDArray[np.bool_]:
    """Mark the share of prompts with the largest margins: at least one, and of equal margins the first.

    Args:
        margins: [prompts] length-regularised reward of chosen minus that of rejected.
        share: in (0, 1].
    """
    num_kept = max(1, round(share * len(margins)))
    limit = np.partition(margins, len(margins) - num_kept)[len(margins) - num_kept]
    is_kept: NDArray[np.bool_] = margins > limit
    equal = np.flatnonzero(margins == limit)
    is_kept[equal[: num_kept - int(is_kept.sum())]] = True
    return is_kept

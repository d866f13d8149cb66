"""Experience replay: how many offline pairs are mixed with the generated ones, which ones, and the evaluation split.

Counts as upstream's create_mix_paired_set (sail-sg/dice, generate_lc_paired_set.py), which samples without a seed and
divides by zero at a ratio of 1; here every draw has a seed and the ratio may be 0 and 1.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]

# One draw a stream, so that a different number of generated pairs does not change the order of the offline ones.
_STREAMS = {"generated": 0, "replayed": 1, "split": 2}

_LARGEST_EVAL_SHARE = 10


def mix_counts(num_offline: int, num_available: int, replay_ratio: float) -> tuple[int, int]:
    """Return how many generated and how many offline pairs make up the training set.

    Upstream's formulas: as many pairs as there are offline ones, a share of `replay_ratio` of them replayed; with fewer
    generated pairs than that leaves room for, both shrink. int() cuts fractions off, so a few pairs fewer than
    num_offline may come out: 10,000 offline pairs at 0.9 are 999 + 8,991, as 10000 * (1 - 0.9) is 999.9999999999998.

    Args:
        num_offline: offline pairs at hand.
        num_available: generated pairs at hand.
        replay_ratio: gamma in [0, 1], the share of offline pairs; 0 takes none, 1 takes all of them and nothing else.

    Returns:
        (num_generated, num_replayed). With no offline pairs and a ratio of 0 there is no size to keep to, and all
        generated pairs are taken.
    """
    if replay_ratio == 1:
        return 0, num_offline
    if replay_ratio == 0 and num_offline == 0:
        return num_available, 0
    num_generated = min(int(num_offline * (1 - replay_ratio)), num_available)
    return num_generated, int(replay_ratio * num_generated / (1 - replay_ratio))


def shuffled(count: int, seed: int, purpose: str) -> Ints:
    """Return 0 .. count - 1 in the random order that this seed has for `generated`, `replayed` or `split`."""
    return np.random.default_rng([seed, _STREAMS[purpose]]).permutation(count)


def draw_replayed(is_taken: ArrayLike, count: int, seed: int) -> Ints:
    """Draw offline pairs whose prompts are not among the generated ones.

    Args:
        is_taken: [offline pairs] whether the prompt of this pair has a generated pair in the training set.
        count: how many to draw; fewer come back where fewer are free (offline data with several pairs a prompt).
        seed: of the draw.

    Returns:
        [drawn] positions, ascending.
    """
    taken = np.asarray(is_taken, dtype=bool)
    order = shuffled(len(taken), seed, "replayed")
    return np.sort(order[~taken[order]][:count])


def eval_mask(prompts: ArrayLike, num_eval_pairs: int, seed: int) -> NDArray[np.bool_]:
    """Mark the pairs that are kept aside to watch the loss.

    Whole prompts are kept aside, so that no prompt is in both splits. Never more than a tenth of all pairs: a setting
    made for ten thousand pairs leaves a small set its training pairs.

    Args:
        prompts: [pairs] a number for each prompt, 0 .. prompts - 1.
        num_eval_pairs: at most this many.
        seed: of the draw.
    """
    owner = np.asarray(prompts, dtype=np.int64)
    limit = min(num_eval_pairs, len(owner) // _LARGEST_EVAL_SHARE)
    sizes = np.bincount(owner)
    order = shuffled(len(sizes), seed, "split")
    is_eval = np.zeros(len(sizes), dtype=bool)
    is_eval[order[np.cumsum(sizes[order]) <= limit]] = True
    return is_eval[owner]

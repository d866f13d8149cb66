"""Length-controlled win rate, as AlpacaEval 2 defines it (Dubois et al. 2024): who wins at equal lengths. Pure numpy.

A logistic regression explains the preferences by the length of the answers, by how difficult an instruction is (where
that is known), and by the model itself; with the length term at 0 it predicts the preferences between answers of one
length. From alpaca_eval/metrics/glm_winrate.py are the terms, L1 as the penalty, no intercept beside the model's term,
and the choice of C. Its two artificial baselines, which belong to one data set, are left out.

    P(candidate preferred) = sigmoid(b_length tanh(D / sd(D)) + b_difficulty d + b_model),  D: characters more
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dice_core.evaluation.estimates import UNKNOWN, Estimate, Floats
from dice_core.evaluation.win_rate import ADDED, percentile_interval, resample_counts

GRID = np.logspace(-4, 4, 10)
"""Of C, the weight of the data against the penalty: scikit-learn's own for Cs=10."""
NUM_FOLDS = 5
_MAX_STEPS = 100
_ENOUGH = 1e-9
_ENOUGH_INSIDE = 1e-6
_ROUNDING = 1e-13
_MAX_SWEEPS = 60
_MAX_HALVINGS = 30
_RESAMPLES_AT_A_TIME = 250
_TINY = 1e-15


@dataclass(frozen=True)
class Fit:
    """A fitted regression."""

    length: float
    """Weight of the longer answer; positive where the judge prefers it."""
    model: float
    """The candidate's own term."""
    difficulty: float | None
    c: float
    win_rate: float
    """Mean prediction at equal lengths."""


def length_controlled_win_rate(
    preferences: ArrayLike,
    lengths: ArrayLike,
    incumbent_lengths: ArrayLike,
    difficulty: ArrayLike | None = None,
    *,
    seed: int,
) -> Estimate:
    """Estimate the win rate at equal lengths, with a bootstrap interval over prompts.

    Resamples are fitted with the C and the scale of lengths of all prompts, and hold two wins and two losses at equal
    lengths beside them, as those of win_rate.py do.

    Args:
        preferences: for the candidate, 0 to 1, one a prompt. Shape: (prompts,)
        lengths: characters of the candidate's answers. Shape: (prompts,)
        incumbent_lengths: of the incumbent's. Shape: (prompts,)
        difficulty: of the instructions, where known. Shape: (prompts,)
        seed: of the resampling.

    Returns:
        Not a number, with an infinite error, with fewer than two prompts.
    """
    targets = np.asarray(preferences, dtype=np.float64)  # (prompts,)
    if targets.size < 2:
        return UNKNOWN
    features = _features(lengths, incumbent_lengths, difficulty)  # (prompts, terms)
    found = fit(preferences, lengths, incumbent_lengths, difficulty)
    added = np.zeros((len(ADDED), features.shape[1]))
    added[:, 1] = 1
    features, targets = np.concatenate([features, added]), np.concatenate([targets, ADDED])
    counts, start = resample_counts(len(targets), seed), _weights(found)  # (resamples, prompts), (terms,)
    pieces = [
        _win_rates(_minimise(features, targets, some, np.full(len(some), found.c), start), features, some)
        for some in np.array_split(counts, -(-len(counts) // _RESAMPLES_AT_A_TIME))
    ]
    values = np.concatenate(pieces)  # (resamples,)
    return Estimate(found.win_rate, float(values.std()), percentile_interval(values))


def fit(
    preferences: ArrayLike, lengths: ArrayLike, incumbent_lengths: ArrayLike, difficulty: ArrayLike | None = None
) -> Fit:
    """Fit the regression: C by cross-validation with difficulties, and without them the largest, nearly no penalty.

    Two terms need no penalty, and one would draw every close comparison to a tie.

    Args: as of length_controlled_win_rate.
    """
    targets = np.asarray(preferences, dtype=np.float64)
    features = _features(lengths, incumbent_lengths, difficulty)
    c = float(GRID[-1]) if difficulty is None else _choose_c(features, targets)
    everything = np.ones((1, len(targets)))
    [weights] = _minimise(features, targets, everything, np.array([c]))
    [rate] = _win_rates(weights[None], features, everything)
    return Fit(float(weights[0]), float(weights[1]), None if difficulty is None else float(weights[2]), c, float(rate))


def folds(num_prompts: int) -> NDArray[np.int64]:
    """Return the fold of each prompt, as scikit-learn's GroupKFold has it. Shape: (prompts,)."""
    return np.arange(num_prompts)[::-1] % min(NUM_FOLDS, num_prompts)


def _weights(found: Fit) -> Floats:
    terms = [found.length, found.model, found.difficulty]
    return np.array([term for term in terms if term is not None])


def _features(lengths: ArrayLike, incumbent_lengths: ArrayLike, difficulty: ArrayLike | None) -> Floats:
    """Return length term, model's term, difficulty. Shape: (prompts, 2 or 3)."""
    difference = np.subtract(lengths, incumbent_lengths, dtype=np.float64)  # (prompts,)
    scale = float(difference.std(ddof=1)) if difference.size > 1 else 0.0
    columns = [np.tanh(difference / scale) if scale else np.zeros_like(difference), np.ones_like(difference)]
    return np.stack(columns + ([] if difficulty is None else [np.asarray(difficulty, dtype=np.float64)]), axis=1)


def _choose_c(features: Floats, targets: Floats) -> float:
    """Return the C with the smallest mean log loss on the folds that were left out; the smallest of equals."""
    fold = folds(len(targets))
    numbers = np.unique(fold)
    is_train = (fold[None] != numbers[:, None]).astype(np.float64)  # (folds, prompts)
    counts = np.tile(is_train, (len(GRID), 1))  # (Cs x folds, prompts), C by C
    weights = _minimise(features, targets, counts, np.repeat(GRID, len(numbers)))
    losses = _log_loss(_sigmoid(weights @ features.T), targets)  # (Cs x folds, prompts)
    left_out = (losses * (1 - counts)).sum(axis=1) / (1 - counts).sum(axis=1)  # (Cs x folds,)
    return float(GRID[left_out.reshape(len(GRID), -1).mean(axis=1).argmin()])


def _log_loss(predicted: Floats, targets: Floats) -> Floats:
    likely = np.clip(predicted, _TINY, 1 - _TINY)
    losses: Floats = -(targets * np.log(likely) + (1 - targets) * np.log(1 - likely))
    return losses


def _win_rates(weights: Floats, features: Floats, counts: Floats) -> Floats:
    """Return the mean prediction at equal lengths of each problem. Shape: (problems,)."""
    if features.shape[1] == 2:
        return _sigmoid(weights[:, 1])
    predicted = _sigmoid(weights[:, 1:] @ features[:, 1:].T)  # (problems, prompts)
    rates: Floats = (counts * predicted).sum(axis=1) / counts.sum(axis=1)
    return rates


def _sigmoid(values: Floats) -> Floats:
    likely: Floats = np.exp(-np.abs(values))
    return np.where(values < 0, likely, 1) / (1 + likely)


def _minimise(features: Floats, targets: Floats, counts: Floats, c: Floats, start: Floats | None = None) -> Floats:
    """Minimise liblinear's L1 objective, sum |w| + C sum_i n_i logloss_i, of many problems at once.

    A target between 0 and 1 is what scikit-learn is given as a row of each class with weights: the log loss is linear
    in it. Proximal Newton: L1 and the quadratic model of the loss, by coordinate descent, then a halved step where the
    objective would rise.

    Args:
        features: Shape: (prompts, terms)
        targets: 0 to 1, of all problems or of each. Shape: (prompts,) or (problems, prompts)
        counts: how often each problem holds each prompt. Shape: (problems, prompts)
        c: of each problem. Shape: (problems,)
        start: where all of them begin; 0 by default. Shape: (terms,)

    Returns:
        Weights. Shape: (problems, terms)
    """
    num_terms = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)  # (prompts, terms x terms)
    weights = np.tile(np.zeros(num_terms) if start is None else start, (len(counts), 1))
    goals = np.broadcast_to(targets, counts.shape)
    open_ones = np.arange(len(counts))
    for _ in range(_MAX_STEPS):
        # Of the problems that are not solved yet.
        scaled, goal, old = counts[open_ones] * c[open_ones, None], goals[open_ones], weights[open_ones]
        likely = _sigmoid(old @ features.T)  # (problems, prompts)
        gradient = (scaled * (likely - goal)) @ features  # (problems, terms)
        curvature = ((scaled * likely * (1 - likely)) @ products).reshape(-1, num_terms, num_terms)
        step = _no_rise(old, _proximal_step(old, gradient, curvature), features, goal, scaled)
        weights[open_ones] = old + step
        open_ones = open_ones[(np.abs(step) > _ENOUGH * (1 + np.abs(old))).any(axis=1)]
        if not open_ones.size:
            break
    return weights


def _no_rise(weights: Floats, step: Floats, features: Floats, targets: Floats, scaled: Floats) -> Floats:
    """Halve the steps with which the objective would rise. Shape: (problems, terms)."""
    highest = _objective(weights, features, targets, scaled) * (1 + _ROUNDING)  # (problems,)
    rises = np.arange(len(weights))
    for _ in range(_MAX_HALVINGS):
        reached = _objective((weights + step)[rises], features, targets[rises], scaled[rises])
        rises = rises[reached > highest[rises]]
        if not rises.size:
            return step
        step[rises] /= 2
    step[rises] = 0
    return step


def _objective(weights: Floats, features: Floats, targets: Floats, scaled: Floats) -> Floats:
    logits = weights @ features.T  # (problems, prompts)
    losses = np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits))) - targets * logits
    costs: Floats = np.abs(weights).sum(axis=1) + (scaled * losses).sum(axis=1)
    return costs


def _proximal_step(weights: Floats, gradient: Floats, curvature: Floats) -> Floats:
    """Minimise gradient d + d curvature d / 2 + |weights + d| for each problem. Shape: (problems, terms)."""
    step = np.zeros_like(weights)
    for _ in range(_MAX_SWEEPS):
        before = step.copy()
        for term in range(weights.shape[1]):
            own = np.maximum(curvature[:, term, term], _TINY)  # (problems,)
            slope = gradient[:, term] + (curvature[:, term] * step).sum(axis=1)
            # Where the model without L1 would put the weight, drawn to 0 by 1 / own.
            wanted = weights[:, term] + step[:, term] - slope / own
            moved = np.sign(wanted) * np.maximum(np.abs(wanted) - 1 / own, 0)
            step[:, term] = moved - weights[:, term]
        # The next step of Newton's mends the rest.
        if np.abs(step - before).max() <= _ENOUGH_INSIDE * np.abs(step).max():
            break
    return step

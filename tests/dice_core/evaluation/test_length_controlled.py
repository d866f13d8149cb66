"""The length-controlled win rate: against scikit-learn, by its symmetry, and in simulations."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dice_core.evaluation.length_controlled import (
    GRID,
    NUM_FOLDS,
    _features,
    _minimise,
    _sigmoid,
    fit,
    folds,
    length_controlled_win_rate,
)
from dice_core.evaluation.win_rate import ADDED, resample_counts
from tests.peer_statistics import ask, logistic

Floats = NDArray[np.float64]
TO_SCIKIT_LEARN = 1e-4


def draw(size: int, seed: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Return preferences by a known regression with noise, lengths of both models, and difficulties."""
    random = np.random.default_rng(seed)
    lengths, others = random.integers(50, 2000, (2, size)).astype(float)
    difficulty = random.normal(size=size)
    difference = lengths - others
    likely = _sigmoid(0.3 + 0.8 * np.tanh(difference / difference.std(ddof=1)) + 0.6 * difficulty)
    return np.clip(likely + 0.3 * random.normal(size=size), 0, 1), lengths, others, difficulty


def columns(lengths: Floats, others: Floats, difficulty: Floats | None) -> Floats:
    difference = lengths - others
    terms = [np.tanh(difference / difference.std(ddof=1)), np.ones(len(lengths))]
    return np.stack(terms if difficulty is None else [*terms, difficulty], axis=1)


@pytest.mark.slow
def test_without_difficulties_it_is_scikit_learns_soft_fit() -> None:
    drawn = [draw(size, seed) for size, seed in ((12, 0), (60, 1), (805, 2))]
    questions = [logistic(columns(lengths, others, None), wins, GRID[-1]) for wins, lengths, others, _ in drawn]
    for (preferences, lengths, others, _), (length, model) in zip(drawn, ask(questions), strict=True):
        found = fit(preferences, lengths, others)
        assert (found.length, found.model) == pytest.approx((length, model), abs=TO_SCIKIT_LEARN)
        assert found.win_rate == pytest.approx(1 / (1 + math.exp(-model)), abs=TO_SCIKIT_LEARN)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "seed"), [(43, 0), (60, 1), (805, 2)])
def test_with_difficulties_it_is_scikit_learns_fit_with_the_c_of_five_folds(size: int, seed: int) -> None:
    preferences, lengths, others, difficulty = draw(size, seed)
    features = columns(lengths, others, difficulty)
    [split] = ask([["folds", size, NUM_FOLDS]])
    asked = [logistic(features[train], preferences[train], c) for train, _ in split for c in GRID]
    of_folds, losses = iter(ask(asked)), np.zeros(len(GRID))
    for _, left_out in split:
        for number in range(len(GRID)):
            likely = _sigmoid(features[left_out] @ np.array(next(of_folds)))
            target = preferences[left_out]
            losses[number] -= np.mean(target * np.log(likely) + (1 - target) * np.log(1 - likely))
    found = fit(preferences, lengths, others, difficulty)
    assert found.c == GRID[losses.argmin()]
    [(length, model, difficult)] = ask([logistic(features, preferences, found.c)])
    assert (found.length, found.model, found.difficulty) == pytest.approx(
        (length, model, difficult), abs=TO_SCIKIT_LEARN
    )
    assert found.win_rate == pytest.approx(_sigmoid(model + difficult * difficulty).mean(), abs=TO_SCIKIT_LEARN)


@pytest.mark.slow
def test_every_penalty_of_the_grid_gives_scikit_learns_weights() -> None:
    preferences, lengths, others, difficulty = draw(150, 4)
    features = columns(lengths, others, difficulty)
    expected = ask([logistic(features, preferences, c) for c in GRID])
    for c, weights in zip(GRID, expected, strict=True):
        [found] = _minimise(features, preferences, np.ones((1, 150)), np.array([c]))
        assert found == pytest.approx(np.array(weights), abs=TO_SCIKIT_LEARN)


@pytest.mark.slow
def test_folds_are_those_of_group_k_fold() -> None:
    sizes = (5, 17, 42)
    for size, split in zip(sizes, ask([["folds", size, NUM_FOLDS] for size in sizes]), strict=True):
        theirs = {frozenset(test) for _, test in split}
        assert {frozenset(np.flatnonzero(folds(size) == number)) for number in range(NUM_FOLDS)} == theirs


@pytest.mark.parametrize("with_difficulty", [False, True])
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), size=st.integers(6, 40))
def test_swapping_the_models_turns_it_into_one_minus_it(with_difficulty: bool, seed: int, size: int) -> None:
    preferences, lengths, others, difficulty = draw(size, seed)
    known = difficulty if with_difficulty else None
    swapped = fit(1 - preferences, others, lengths, known)
    assert swapped.win_rate == pytest.approx(1 - fit(preferences, lengths, others, known).win_rate, abs=1e-7)


def test_a_judge_of_length_alone_finds_no_winner_at_equal_lengths() -> None:
    random = np.random.default_rng(0)
    others = random.integers(100, 1000, 500).astype(float)
    lengths = others * random.uniform(0.9, 1.5, 500)
    preferences = (lengths > others).astype(float)
    found = length_controlled_win_rate(preferences, lengths, others, seed=1)
    assert preferences.mean() > 0.8
    assert found.value < 0.6 and found.low < 0.5


def test_answers_of_one_length_leave_the_win_rate_as_it_is() -> None:
    found = length_controlled_win_rate([1, 1, 1, 0.5, 0], [9] * 5, [9] * 5, seed=0)
    assert found.value == pytest.approx(0.7, abs=TO_SCIKIT_LEARN)
    assert found.low < 0.5


def test_all_of_few_prompts_won_is_not_certain() -> None:
    found = length_controlled_win_rate(np.ones(4), [1, 2, 3, 4], [4, 3, 2, 1], seed=0)
    assert found.low < 0.5 < found.value <= found.high + 1e-4


@pytest.mark.parametrize("size", [0, 1])
def test_nothing_is_known_from_fewer_than_two_prompts(size: int) -> None:
    assert math.isnan(length_controlled_win_rate(np.ones(size), np.ones(size), np.ones(size), seed=0).value)


@pytest.mark.slow
def test_intervals_hold_the_truth_in_95_of_100_simulations() -> None:
    """What length_controlled_win_rate does, for many simulations at once: lengths and resamples are those of all."""
    size, num_simulations, num_resamples, together = 60, 2000, 199, 20
    random = np.random.default_rng(1)
    features = _features(*random.integers(50, 1000, (2, size)).astype(float), None)
    truth = np.array([0.8, 0.5])
    likely = _sigmoid(features @ truth)
    draws = random.beta(4 * likely, 4 * (1 - likely), (num_simulations, size))
    targets = np.hstack([draws, np.tile(ADDED, (num_simulations, 1))])
    features = np.vstack([features, [[0, 1]] * len(ADDED)])
    counts = np.tile(resample_counts(len(features), 7, num_resamples), (together, 1))
    held = 0
    for some in np.split(targets, num_simulations // together):
        weights = _minimise(features, np.repeat(some, num_resamples, 0), counts, np.full(len(counts), GRID[-1]), truth)
        low, high = np.percentile(_sigmoid(weights[:, 1]).reshape(together, -1), (2.5, 97.5), axis=1)
        held += int(((low <= _sigmoid(truth[1:])) & (_sigmoid(truth[1:]) <= high)).sum())
    assert 0.93 <= held / num_simulations <= 0.97

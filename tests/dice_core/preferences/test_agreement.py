"""Kendall's tau-b: worked by hand, and by its definition in plain Python, which agrees with scipy's kendalltau."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.preferences.agreement import kendall_tau_b, mean_agreement, taus_by_prompt

# Few values, so that ties are frequent.
pairs_of_rewards = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20)


def plain_tau(rewards: list[tuple[int, int]]) -> float:
    """Return tau-b by its definition: agreeing less disagreeing pairs, over those untied in either."""
    orders = [((a > b) - (a < b), (c > d) - (c < d)) for (a, c), (b, d) in combinations(rewards, 2)]
    untied = [sum(bool(order[i]) for order in orders) for i in range(2)]
    return sum(a * b for a, b in orders) / math.sqrt(math.prod(untied)) if all(untied) else math.nan


def tau(first: list[float], second: list[float]) -> float:
    return float(kendall_tau_b(np.array([first], dtype=float), np.array([second], dtype=float))[0])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [30, 20, 10], -1.0),
        # Of three pairs two agree and one does not.
        ([1, 2, 3], [10, 30, 20], 1 / 3),
        # Two pairs agree, one is tied in the second: 2 / sqrt(3 x 2).
        ([1, 2, 3], [10, 20, 20], 2 / math.sqrt(6)),
        # Tied in both alike: the pairs that can agree all do.
        ([1, 2, 2], [10, 20, 20], 1.0),
    ],
)
def test_tau_of_a_few_responses(first, second, expected):
    assert tau(first, second) == pytest.approx(expected)


def test_equal_rewards_rank_nothing():
    assert math.isnan(tau([1, 1, 1], [1, 2, 3]))


@given(pairs_of_rewards)
def test_tau_is_that_of_its_definition(rewards):
    first, second = (list(values) for values in zip(*rewards, strict=True))
    assert tau(first, second) == pytest.approx(plain_tau(rewards), nan_ok=True)


@given(st.lists(pairs_of_rewards, max_size=6), st.randoms(use_true_random=False))
def test_prompts_of_any_size_in_any_order_are_told_apart(prompts, random):
    rows = [(number, *pair) for number, rewards in enumerate(prompts) for pair in rewards]
    random.shuffle(rows)
    numbers, first, second = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    taus = taus_by_prompt(numbers, first.astype(float), second.astype(float))
    expected = [plain_tau(rewards) for rewards in prompts]
    assert sorted(taus) == pytest.approx(sorted(value for value in expected if not math.isnan(value)))


def test_a_prompt_with_one_response_and_no_prompt_at_all_rank_nothing():
    assert mean_agreement(taus_by_prompt(np.array([4]), np.array([1.0]), np.array([2.0]))) == (None, 0)
    assert mean_agreement(np.array([1.0, 0.0])) == (0.5, 2)

"""The implicit reward, its length-regularised form, and the two scales of alpha."""

import numpy as np
import pytest

from dice_core.preferences.reward import implicit_reward, length_regularised_reward, paper_length_penalty


def test_reward_is_policy_minus_reference_in_nats_without_beta():
    """-120 - -150 = 30; -80 - -75 = -5; equal models give 0."""
    rewards = implicit_reward([-120.0, -80.0, -60.0], [-150.0, -75.0, -60.0])
    np.testing.assert_array_equal(rewards, [30.0, -5.0, 0.0])


def test_reward_of_two_impossible_responses_is_not_a_number_and_warns_nobody(recwarn):
    assert np.isnan(implicit_reward([-np.inf], [-np.inf])[0])
    assert not recwarn.list


def test_length_regularised_reward_subtracts_nats_per_unit():
    """30 - 0.02 * 1000 = 10; 8 - 0.02 * 100 = 6."""
    np.testing.assert_allclose(length_regularised_reward([30.0, 8.0], [1000, 100], 0.02), [10.0, 6.0])


def test_negative_penalty_rewards_length():
    assert length_regularised_reward(1.0, 50, -0.1) == 6.0


def test_paper_alpha_is_beta_times_code_alpha():
    """Upstream's 0.023 for Zephyr at beta 0.1 is 0.0023 in Eq. 5."""
    assert paper_length_penalty(0.023, beta=0.1) == pytest.approx(0.0023)


def test_both_scales_differ_by_beta_alone_so_they_rank_alike():
    rewards, lengths, beta = np.array([30.0, 8.0, -3.0]), np.array([1000, 100, 400]), 0.1
    paper = beta * rewards - paper_length_penalty(0.02, beta) * lengths
    np.testing.assert_allclose(paper, beta * length_regularised_reward(rewards, lengths, 0.02))

"""Replay counts as upstream's formulas, disjoint seeded draws, and the evaluation split."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.preferences.replay import draw_replayed, eval_mask, mix_counts, shuffled
from tests.upstream_pairing import mixed


@pytest.mark.parametrize(
    ("num_offline", "num_available", "replay_ratio", "expected"),
    [
        (10_000, 9_874, 0.5, (5_000, 5_000)),
        (10_000, 1_000, 0.5, (1_000, 1_000)),  # fewer generated pairs: both halves shrink
        (10_000, 9_874, 0.9, (999, 8_991)),  # 10000 * (1 - 0.9) is 999.9999999999998
        (10_000, 9_874, 0.0, (9_874, 0)),
        (100, 9_874, 0.0, (100, 0)),  # as many pairs as there are offline ones
        (0, 9_874, 0.0, (9_874, 0)),  # no offline pairs: no size to keep to
        (10_000, 9_874, 1.0, (0, 10_000)),
        (10_000, 0, 1.0, (0, 10_000)),
        (10_000, 0, 0.5, (0, 0)),
        (1, 5, 0.5, (0, 0)),  # int(0.5) is 0
    ],
)
def test_mix_counts_by_hand(num_offline, num_available, replay_ratio, expected):
    assert mix_counts(num_offline, num_available, replay_ratio) == expected


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 0.99))
def test_mix_counts_are_upstreams(num_offline, num_available, replay_ratio):
    generated = pd.DataFrame({"prompt": range(num_available)})
    offline = pd.DataFrame({"prompt": range(num_offline)})
    expected = tuple(len(frame) for frame in mixed(generated, offline, replay_ratio, seed=0))
    assert mix_counts(num_offline, num_available, replay_ratio) == expected


@given(st.integers(0, 20_000), st.integers(0, 20_000), st.floats(0, 1))
def test_mix_never_asks_for_more_than_there_is(num_offline, num_available, replay_ratio):
    num_generated, num_replayed = mix_counts(num_offline, num_available, replay_ratio)
    assert 0 <= num_generated <= num_available
    assert 0 <= num_replayed <= num_offline
    assert num_generated + num_replayed <= num_offline or num_offline == 0


@given(st.lists(st.booleans(), max_size=50), st.integers(0, 60), st.integers(0, 2**31 - 1))
def test_replayed_pairs_are_free_ones_each_once(taken, count, seed):
    drawn = draw_replayed(taken, count, seed)
    assert len(drawn) == min(count, taken.count(False))
    assert len(set(drawn.tolist())) == len(drawn)
    assert not any(taken[position] for position in drawn)


def test_draws_follow_the_seed_and_the_purpose():
    assert shuffled(100, 1, "replayed").tolist() == shuffled(100, 1, "replayed").tolist()
    assert shuffled(100, 1, "replayed").tolist() != shuffled(100, 2, "replayed").tolist()
    assert shuffled(100, 1, "replayed").tolist() != shuffled(100, 1, "generated").tolist()


@pytest.mark.parametrize(
    ("num_pairs", "asked", "expected"), [(9_600, 576, 576), (2_000, 576, 200), (9, 576, 0), (50, 0, 0)]
)
def test_eval_split_is_at_most_a_tenth(num_pairs, asked, expected):
    assert eval_mask(np.arange(num_pairs), asked, seed=1).sum() == expected


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(0, 20))
def test_eval_split_keeps_prompts_whole(owners, asked):
    codes = np.unique(owners, return_inverse=True)[1]
    mask = eval_mask(codes, asked, seed=2)
    assert mask.sum() <= min(asked, len(owners) // 10)
    assert not set(codes[mask]) & set(codes[~mask])


def test_eval_split_follows_the_seed():
    splits = [eval_mask(np.arange(100), 10, seed).tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]

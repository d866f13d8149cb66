"""Tokens of stages: worked by hand, and against what real runs counted."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.settings.base import ConfigError
from dice_core.storage import layout
from dice_core.storage.manifest import Manifest, publish_files
from pipelines.overrides import apply_overrides
from pipelines.planning.data_counts import DataCounts, TextLengths, counts_of
from pipelines.planning.ranges import Range, exactly
from pipelines.planning.workload import Workload, limited_mean, mean_uncut, num_scored, share_uncut
from pipelines.presets import PRESETS

EXACT = DataCounts(100, 90, 20, TextLengths(exactly(50), exactly(40)), "by hand")


def workload(*changes: str, data: DataCounts = EXACT, length: float = 30) -> Workload:
    return Workload(apply_overrides(PRESETS["zephyr"](), changes), data, exactly(length))


@given(st.floats(1, 5000), st.integers(1, 5000))
def test_the_mean_under_a_limit_is_that_of_the_uncut_and_of_the_cut(mean: float, limit: int) -> None:
    uncut = share_uncut(mean, limit)
    assert limited_mean(mean, limit) <= min(mean, limit) * (1 + 1e-9)
    if uncut > 1e-3:
        both = uncut * mean_uncut(mean, limit) + (1 - uncut) * limit
        assert limited_mean(mean, limit) == pytest.approx(both, rel=1e-6)


@given(st.floats(1, 1e9), st.floats(1, 1e9), st.integers(1, 100_000))
def test_the_longer_the_mean_the_longer_are_those_that_end_and_they_are_shorter_than_the_limit(
    one: float, other: float, limit: int
) -> None:
    low, high = (mean_uncut(mean, limit) for mean in sorted((one, other)))
    assert 0 < low <= high * (1 + 1e-9) and high <= limit / 2


def test_responses_cut_by_a_limit_are_as_many_as_a_real_run_counted() -> None:
    """The demo's iteration 1: 5,040 tokens of 88 responses under a limit of 96; 21 were cut, 62 of 67 had company."""
    mean = 78
    assert limited_mean(mean, 96) == pytest.approx(5040 / 88, rel=0.05)
    assert 1 - share_uncut(mean, 96) == pytest.approx(21 / 88, abs=0.06)
    assert num_scored(22, 4, share_uncut(mean, 96), 2) == pytest.approx(62, rel=0.1)


@given(st.integers(2, 5000), st.floats(0.01, 1), st.data())
def test_the_more_valid_responses_a_prompt_needs_the_fewer_are_scored(
    num_responses: int, uncut: float, data: st.DataObject
) -> None:
    least = data.draw(st.integers(1, num_responses))
    assert num_scored(1, num_responses, uncut, 1) == pytest.approx(num_responses * uncut)
    assert num_scored(1, num_responses, uncut, least) <= num_responses * uncut * (1 + 1e-9)


def test_generation_runs_a_prompt_once_and_each_of_its_responses() -> None:
    made = workload("generation.num_responses=4", "scoring.min_valid_responses=2").generated()
    assert made.of_responses.low == pytest.approx(100 * 4 * 30)
    assert made.all.low == pytest.approx(100 * 50 + 100 * 4 * 30)


def test_training_runs_a_prompt_once_and_two_responses_of_every_pair() -> None:
    """Half of the pairs are offline (40 tokens), half generated (30): a pair is 50 + 2 x 35."""
    made = workload("training.max_steps=10")
    trained = made.trained(made.preset.training, is_warm_start=False)
    assert trained.all.low == pytest.approx(10 * 32 * 120)
    assert trained.of_responses.low == pytest.approx(10 * 32 * 70)


def test_replay_keeps_its_share_of_the_pairs() -> None:
    """90 offline pairs and gamma 0.5: 45 generated ones and as many replayed."""
    assert workload().num_pairs(is_warm_start=False) == 90
    assert workload("pairing.replay_ratio=0.9").num_pairs(is_warm_start=False) == 8 + 72
    assert workload("pairing.replay_ratio=1.0").num_pairs(is_warm_start=False) == 90
    assert workload().num_eval_pairs(is_warm_start=False) == 9


def test_the_largest_row_is_that_of_the_longest_pair_or_of_several() -> None:
    made = workload("training.max_length=60")
    assert made.largest_row(made.preset.training, is_warm_start=False) == 2 * 120
    alone = workload("training.max_length=4096")
    assert alone.largest_row(alone.preset.training, is_warm_start=False) == 2 * 4096 - 50


def test_the_demos_data_are_counted_in_its_file() -> None:
    demo = apply_overrides(PRESETS["demo"](), [])
    found = counts_of(demo)
    assert found is not None
    assert (found.num_prompts, found.num_preferences, found.num_held_out) == (22, 36, 16)
    # Of the demo's own pairs, tokenised: 48 tokens of a prompt with its template, 32 of a response.
    assert found.lengths.prompt.low < 48 < found.lengths.prompt.high
    assert found.lengths.response.low < 32 < found.lengths.response.high


def test_a_known_set_gives_the_presets_share_of_its_rows() -> None:
    found = counts_of(PRESETS["zephyr"]())
    assert found is not None
    assert (found.num_prompts, found.num_preferences, found.num_held_out) == (10_000, 10_000, 1_100)


def test_a_set_that_nothing_tells_of_is_not_known() -> None:
    preset = apply_overrides(PRESETS["zephyr"](), ["preferences_source=s3://bucket/pairs"])
    assert counts_of(preset) is None


def test_a_run_that_has_prepared_its_data_tells_their_counts(tmp_path: Path) -> None:
    uri = layout.run(str(tmp_path), "one")
    with pytest.raises(ConfigError, match="the run has not prepared its data"):
        counts_of(PRESETS["zephyr"](), uri)
    metrics = {"num_prompts": 7, "num_preferences": 6, "num_held_out": 5}
    publish_files(layout.data(uri), {}, Manifest(stage="prepare-data", fingerprint="", files={}, metrics=metrics))
    found = counts_of(PRESETS["zephyr"](), uri)
    assert found is not None
    assert (found.num_prompts, found.num_preferences, found.num_held_out) == (7, 6, 5)


def test_bounds_of_lengths_become_bounds_of_tokens() -> None:
    lengths = TextLengths(Range(10, 20), Range(30, 60))
    wide = Workload(PRESETS["zephyr"](), DataCounts(100, 90, 20, lengths, ""), Range(30, 60))
    for tokens in (wide.generated(), wide.scored(), wide.pair(is_warm_start=False), wide.held_out(), wide.answers()):
        assert 0 < tokens.of_responses.low < tokens.of_responses.high
        assert tokens.of_responses.low < tokens.all.low < tokens.all.high
        assert math.isfinite(tokens.all.high)

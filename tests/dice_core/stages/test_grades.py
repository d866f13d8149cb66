"""Who ranks the responses of a run, and what is refused before anything starts."""

import pytest

from dice_core.judges.settings import GradingConfig
from dice_core.preferences.settings import ScoringConfig
from dice_core.settings.base import ConfigError
from dice_core.stages.grades import check_reward

ENDPOINT = {"endpoint_url": "https://judge.example/v1", "endpoint_model": "judge"}


@pytest.mark.parametrize(
    ("reward", "reward_uri", "grading"),
    [
        ("implicit", "", {}),
        ("implicit", "", ENDPOINT),
        ("reward-model", "s3://b/models/reward", {}),
        ("judge", "s3://b/models/judge", {}),
        ("judge", "", ENDPOINT),
    ],
)
def test_each_reward_with_what_it_needs_passes(reward, reward_uri, grading):
    check_reward(
        ScoringConfig(reward=reward), GradingConfig(**grading), reward_uri=reward_uri, data_uri="s3://b/runs/r/data"
    )


@pytest.mark.parametrize(
    ("reward", "reward_uri", "grading", "message"),
    [
        ("implicit", "s3://b/models/reward", {}, "is 'implicit', which uses no model of rewards: set"),
        ("reward-model", "", {}, "'reward-model' needs the model that gives rewards"),
        ("reward-model", "", ENDPOINT, "'reward-model' needs the model that gives rewards"),
        ("judge", "", {}, "one of them; neither is given"),
        ("judge", "s3://b/models/judge", ENDPOINT, "one of them; both are given"),
    ],
)
def test_a_reward_without_its_model_or_with_one_too_many_is_refused_in_one_line(reward, reward_uri, grading, message):
    with pytest.raises(ConfigError, match=rf"^scoring.reward: .*{message}") as error:
        check_reward(ScoringConfig(reward=reward), GradingConfig(**grading), reward_uri=reward_uri, data_uri="data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reward", ["reward-model", "judge"])
def test_a_reward_that_reads_prompts_needs_their_texts(reward):
    with pytest.raises(ConfigError, match=f"'{reward}' reads the texts of the prompts: give the data of prepare-data"):
        check_reward(ScoringConfig(reward=reward), GradingConfig(), reward_uri="s3://b/models/reward", data_uri="")

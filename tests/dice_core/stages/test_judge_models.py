"""Whether a run needs a judge, of which kind, and that no answer is judged by what rewarded it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dice_core.judges.settings import GradingConfig, JudgingConfig
from dice_core.settings.base import ConfigError
from dice_core.stages.check_settings import check_run
from dice_core.stages.judge_models import check_judge_models, kind_for
from dice_core.storage import layout
from dice_core.storage.failures import failures_of_run

ENDPOINT = {"endpoint_url": "https://a.example/v1", "endpoint_model": "gpt"}
KEY = "DICE_JUDGE_API_KEY"


@pytest.mark.parametrize(
    ("role", "sections", "kind"),
    [
        ("", {}, "language-model"),
        ("judge", {}, None),
        ("judge", {"judging": {"judge": "reward-model"}}, "reward-model"),
        ("judge", {"judging": {"judge": "chat-logprob"}}, "language-model"),
        ("judge", {"judging": {"judge": "endpoint"}}, None),
        ("reward", {"scoring": {}}, None),
        ("reward", {"scoring": {"reward": "implicit"}}, None),
        ("reward", {"scoring": {"reward": "reward-model"}}, "reward-model"),
        ("reward", {"scoring": {"reward": "judge"}}, "language-model"),
    ],
)
def test_the_settings_say_which_kind_of_model_a_role_needs(
    role: str, sections: dict[str, dict[str, Any]], kind: str | None
) -> None:
    assert kind_for(role, sections) == kind


def check(
    judging: dict[str, Any], *, reward: str = "implicit", grading: dict[str, Any] | None = None, **sources: str
) -> None:
    sections: dict[str, Any] = {
        "judging": JudgingConfig.parse(judging, "judging"),
        "scoring": SimpleNamespace(reward=reward),
        "grading": GradingConfig.parse(grading, "grading"),
    }
    given = {"judge_source": "", "reward_source": "", **sources}
    check_judge_models(sections, given["judge_source"], given["reward_source"], needs_keys=True)


@pytest.mark.parametrize(
    ("judging", "others", "message"),
    [
        ({"judge": "reward-model"}, {}, "judge_source: is empty, and judging.judge is reward-model: name the judge's"),
        ({"judge": "chat-logprob"}, {}, "judge_source: is empty, and judging.judge is chat-logprob"),
        ({"judge": "endpoint"}, {}, "judging.endpoint_url: is empty, and an endpoint is to judge"),
        ({}, {"reward": "reward-model"}, "reward_source: is empty, and scoring.reward is reward-model"),
        ({}, {"reward": "judge"}, "reward_source: is empty, and scoring.reward is judge"),
        (
            {"judge": "reward-model"},
            {"reward": "reward-model", "judge_source": "org/a", "reward_source": "org/a/"},
            "judge_source: org/a ranks the responses that are trained on .* so it cannot judge the policy",
        ),
        (
            {"judge": "endpoint", **ENDPOINT},
            {"reward": "judge", "grading": {**ENDPOINT, "endpoint_url": "https://a.example/v1/"}},
            "judge_source: gpt at https://a.example/v1 ranks the responses that are trained on",
        ),
    ],
)
def test_a_judge_that_is_not_there_or_is_the_rewards_source_is_refused(
    judging: dict[str, Any], others: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret")
    with pytest.raises(ConfigError, match=message) as caught:
        check(judging, **others)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("judging", "others"),
    [
        ({}, {}),
        ({}, {"judge_source": "org/a"}),
        ({"judge": "reward-model"}, {"judge_source": "org/a"}),
        ({"judge": "endpoint", **ENDPOINT}, {}),
        ({"judge": "reward-model"}, {"judge_source": "org/a", "reward": "reward-model", "reward_source": "org/b"}),
        # What ranks nothing is no reward.
        ({"judge": "reward-model"}, {"judge_source": "org/a", "reward_source": "org/a"}),
        ({"judge": "endpoint", **ENDPOINT}, {"reward": "judge", "reward_source": "org/b", "grading": ENDPOINT}),
        ({"judge": "reward-model"}, {"judge_source": "org/a", "reward": "judge", "grading": ENDPOINT}),
    ],
)
def test_a_judge_that_is_there_passes(
    judging: dict[str, Any], others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret")
    check(judging, **others)


def test_an_endpoint_without_its_key_fails_at_the_first_task_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    plan: dict[str, Any] = {"num_iterations": 1, "num_shards": 1, "seed": 1, "promote_as": "", "policy_source": "o/p"}
    plan |= {"reference_source": "o/r", "preferences_source": "s3://b/p", "prompts_source": "", "exclude_source": ""}
    sections = {"judging": {"judge": "endpoint", **ENDPOINT}}
    root = str(tmp_path)
    with pytest.raises(ConfigError, match=f"judging.endpoint_key_variable: {KEY} is not set here: fill it from"):
        check_run(root, "r", sections, **plan)
    [failure] = failures_of_run(layout.run(root, "r"))
    assert failure.is_final
    monkeypatch.setenv(KEY, "secret-value")
    check_run(root, "r", sections, **plan)
    # Nothing that a run writes down has the key in it.
    assert all("secret-value" not in path.read_text() for path in tmp_path.rglob("*.json"))

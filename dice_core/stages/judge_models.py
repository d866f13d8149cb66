"""The models of a run that judge: whether its settings need one, of which kind, and that no answer is its own judge.

A judge compares the answers of two policies, in evaluate. A reward ranks the responses to train on, in score. What they
do is the room `judges`'. Loads no torch.
"""

from collections.abc import Mapping
from typing import Any

from dice_core.judges.endpoint_key import api_key
from dice_core.judges.settings import JudgeModelConfig, JudgingConfig
from dice_core.models.files import ModelKind
from dice_core.settings.base import ConfigError, Settings

JUDGE, REWARD = "judge", "reward"
"""The roles. The source of each is a parameter of a run, `judge_source` and `reward_source`."""
_REWARD_KINDS: Mapping[str, ModelKind] = {"reward-model": "reward-model", "judge": "language-model"}


def kind_for(role: str, sections: Mapping[str, Mapping[str, Any]]) -> ModelKind | None:
    """Return which kind of model a role needs.

    Args:
        role: JUDGE or REWARD; any other is a policy or a reference.
        sections: the settings of the run, as plain values.

    Returns:
        None where the settings need no model in that role.
    """
    if role == JUDGE:
        return JudgingConfig.parse(sections.get("judging"), "judging").model_kind
    if role == REWARD:
        return _REWARD_KINDS.get(str((sections.get("scoring") or {}).get("reward")))
    return "language-model"


def check_judge_models(
    sections: Mapping[str, Settings], judge_source: str, reward_source: str, *, needs_keys: bool
) -> None:
    """Check that whoever judges and rewards is named, is not the same, and has its key.

    Args:
        sections: of a run.
        judge_source: the model of judging.judge.
        reward_source: the model of scoring.reward.
        needs_keys: whether the keys of endpoints have to be in the environment: they are in a pod of the run.

    Raises:
        ConfigError: one line that names the setting.
    """
    judging, grading = sections["judging"], sections.get("grading")
    assert isinstance(judging, JudgingConfig)
    reward = str(getattr(sections["scoring"], "reward", "implicit"))
    if judging.model_kind and not judge_source:
        raise ConfigError(
            f"judge_source: is empty, and judging.judge is {judging.judge}: name the judge's model when the "
            "pipeline is compiled (SET=judge_source=...), or set judging.judge=none"
        )
    endpoints = endpoints_of(sections, reward_source)
    if reward in _REWARD_KINDS and not reward_source and "grading" not in endpoints:
        raise ConfigError(
            f"reward_source: is empty, and scoring.reward is {reward}: name the model when the "
            "pipeline is compiled (SET=reward_source=...), or set scoring.reward=implicit"
        )
    if needs_keys:
        for section, config in endpoints.items():
            api_key(config, section)
    judge = _identity(judging, judge_source) if judging.judge != "none" else None
    rewarder = _identity(grading, reward_source) if reward in _REWARD_KINDS else None
    if judge and judge == rewarder:
        raise ConfigError(
            f"judge_source: {judge} ranks the responses that are trained on (scoring.reward {reward}), so it cannot "
            "judge the policy that learnt them: take another judge"
        )


def endpoints_of(sections: Mapping[str, Settings], reward_source: str) -> dict[str, JudgeModelConfig]:
    """Return the settings of the endpoints that a run asks, by section.

    Args:
        sections: of a run.
        reward_source: the model of scoring.reward; without one, a judge that grades is behind an endpoint.
    """
    found: dict[str, JudgeModelConfig] = {}
    judging, grading = sections["judging"], sections.get("grading")
    if isinstance(judging, JudgingConfig) and judging.judge == "endpoint":
        found["judging"] = judging
    is_judge = getattr(sections["scoring"], "reward", "implicit") == "judge"
    if is_judge and not reward_source and isinstance(grading, JudgeModelConfig) and grading.endpoint_url:
        found["grading"] = grading
    return found


def _identity(config: Settings | None, source: str) -> str:
    """Return what tells one judge from another, for people too."""
    if isinstance(config, JudgeModelConfig) and (
        (isinstance(config, JudgingConfig) and config.judge == "endpoint") or not source
    ):
        return f"{config.endpoint_model} at {config.endpoint_url.rstrip('/')}"
    return source.rstrip("/")

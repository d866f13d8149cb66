"""Stage check-settings: each setting of a run on its own, and those of several stages that must fit each other.

It comes first, so that a run of hours does not end at its third stage for a number that was wrong from the start. Loads
no torch.
"""

from collections.abc import Mapping
from typing import Any

from dice_core.launch.settings import LaunchConfig, parse_launch
from dice_core.preferences.settings import GenerationConfig, ScoringConfig
from dice_core.settings.base import ConfigError, Settings
from dice_core.stages.table import SECTIONS, WARM_START_TRAINING
from dice_core.training.settings import TrainingConfig


def check_settings(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the settings of a run.

    Args:
        sections: section name to plain values, as Kubeflow Pipelines hands them over; a section left out has defaults;
            `warm_start_training` left out means that there is no warm start.

    Raises:
        ConfigError: the first setting that is unknown, out of range, or does not fit another; one line.
    """
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise ConfigError(f"{unknown[0]}: unknown section, allowed: {', '.join(SECTIONS)}")
    parsed = {name: kind.parse(sections[name], name) for name, kind in SECTIONS.items() if name in sections}
    parsed = {name: kind() for name, kind in SECTIONS.items() if name != WARM_START_TRAINING} | parsed
    parse_launch(sections.get("launch"), sections.get("pods"))
    _check_fit(**parsed)  # type: ignore[arg-type]


def _check_fit(
    *,
    generation: GenerationConfig,
    scoring: ScoringConfig,
    training: TrainingConfig,
    launch: LaunchConfig,
    warm_start_training: TrainingConfig | None = None,
    **_: Settings,
) -> None:
    if scoring.min_valid_responses > generation.num_responses:
        raise ConfigError(
            f"scoring.min_valid_responses: must not exceed generation.num_responses {generation.num_responses}, "
            f"or no prompt would ever have enough, got {scoring.min_valid_responses}"
        )
    num_processes = launch.num_nodes * launch.processes_per_node
    training.accumulation_steps(num_processes)
    if warm_start_training is not None:
        warm_start_training.accumulation_steps(num_processes)


def check_settings_task(warm_start_training: Mapping[str, Any], **sections: Mapping[str, Any]) -> None:
    """Check all settings of a run, as a task of a pipeline.

    Args:
        warm_start_training: empty where the run has no warm start.
        sections: the others, by name.
    """
    check_settings(sections | ({WARM_START_TRAINING: warm_start_training} if warm_start_training else {}))

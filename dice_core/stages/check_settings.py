"""Stage check-settings: each setting of a run on its own, those of several stages together, and what the run holds.

It comes first, so that a run of hours does not end at its third stage for a number that was wrong from the start, or at
its last for one that differs from what the run was begun with. Loads no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dice_core.data.settings import DataConfig
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.launch.job_kinds import JOB_KINDS
from dice_core.launch.settings import LaunchConfig, parse_launch
from dice_core.preferences.settings import PairingConfig, ScoringConfig
from dice_core.settings.base import ConfigError, Settings
from dice_core.stages.recurring_name import given_or_new
from dice_core.stages.table import CHECK_SETTINGS, SECTIONS, WARM_START_TRAINING
from dice_core.storage import layout
from dice_core.training.settings import TrainingConfig


def check_run(
    root: str,
    run: str,
    sections: Mapping[str, Mapping[str, Any]],
    *,
    service_account: str = "",
    token: Path | None = None,
    **plan: Any,
) -> None:
    """Check all that a run is started with: for itself, and against what the run holds already.

    What passes is written down at the run, the number of its iterations for the pages that stages write.

    Args:
        root: where all runs keep their data.
        run: name of the run.
        sections: see check_settings.
        service_account: that this pod should have; empty: any.
        token: of this pod's account, where it is not at its usual place.
        plan: the other fields of held_by_run.RunPlan.

    Raises:
        ConfigError: a setting is wrong, or the run holds results of other settings: all of them, in one line.
    """
    # Loaded here: whoever only checks settings on the way to a cluster needs none of it.
    from dice_core.stages.attempts import attempt
    from dice_core.stages.service_account import TOKEN, account_remedy, require_right_to_train
    from dice_core.storage.contract import NoAccessError

    remedy = account_remedy(service_account, token or TOKEN)
    try:
        with attempt(CHECK_SETTINGS, layout.check_settings(layout.run(root, run))):
            parsed = check_settings(sections)
            _check_graph(PairingConfig.parse(sections.get("pairing"), "pairing").replay_ratio, plan["num_shards"])
            kind = JOB_KINDS.get(LaunchConfig.parse(sections.get("launch"), "launch").backend)
            if remedy and kind:
                require_right_to_train(kind, remedy)
            _compare_and_record(root, run, parsed, plan)
    except NoAccessError as error:
        raise NoAccessError(f"{error}; {remedy}" if remedy else str(error)) from None


def _check_graph(replay_ratio: float, num_shards: int) -> None:
    """Check that what is sampled is used: which tasks there are was fixed when the pipeline was compiled.

    Raises:
        ConfigError: replay_ratio was changed from or to 1.
    """
    if num_shards and replay_ratio == 1:
        raise ConfigError(
            "pairing.replay_ratio: 1 trains on offline pairs alone, and this pipeline samples responses: submit one "
            "with SET='pairing.replay_ratio=1', which samples none"
        )
    if not num_shards and replay_ratio != 1:
        raise ConfigError(
            f"pairing.replay_ratio: must be 1 in this pipeline, which samples no response, got {replay_ratio}: submit "
            f"one with SET='pairing.replay_ratio={replay_ratio}'"
        )


def _compare_and_record(root: str, run: str, sections: Mapping[str, Settings], plan: Mapping[str, Any]) -> None:
    from dice_core.stages.held_by_run import RunPlan, describe, find_differences
    from dice_core.stages.judge_models import check_judge_models
    from dice_core.storage.manifest import Manifest, publish_files
    from dice_core.storage.run_contents import read_contents
    from dice_core.tracking.run_tracking import begin_run

    chosen = RunPlan(root=root, run=run, sections=sections, **plan)
    if chosen.has_warm_start and WARM_START_TRAINING not in sections:
        raise ConfigError("reference_source: is empty, name what the policy's own DPO started from")
    check_judge_models(sections, chosen.judge_source, chosen.reward_source, needs_keys=True)
    _require_incumbent(chosen.root, chosen.promote_as)
    if found := find_differences(chosen, read_contents(chosen.uri)):
        raise ConfigError(
            f"run {run}: holds results of other settings: {describe(found)}: take another run name, or the old values"
        )
    record = Manifest(stage=CHECK_SETTINGS.name, fingerprint="", files={}, settings=chosen.to_dict())
    publish_files(layout.check_settings(chosen.uri), {}, record)
    begin_run(chosen.uri, chosen.to_dict())


def _require_incumbent(root: str, promote_as: str) -> None:
    """Check that the promoted model is there: each evaluation compares its policy with it.

    Raises:
        StorageError: it is gone, or was made anew.
    """
    from dice_core.storage.promotion import read_promotion, require_content

    pointer = layout.promoted(root, promote_as) if promote_as else ""
    promotion = read_promotion(pointer) if pointer else None
    if promotion:
        require_content(promotion.policy_uri, promotion.content_digest, pointer)


def check_settings(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Settings]:
    """Check the settings of a run, and return them.

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
    return parsed


def _check_fit(
    *,
    data: DataConfig,
    generation: GenerationConfig,
    scoring: ScoringConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    launch: LaunchConfig,
    warm_start_training: TrainingConfig | None = None,
    **_: Settings,
) -> None:
    if scoring.min_valid_responses > generation.num_responses:
        raise ConfigError(
            f"scoring.min_valid_responses: must not exceed generation.num_responses {generation.num_responses}, "
            f"or no prompt would ever have enough, got {scoring.min_valid_responses}"
        )
    if evaluation.num_sample_prompts > data.num_held_out:
        raise ConfigError(
            f"evaluation.num_sample_prompts: must not exceed data.num_held_out {data.num_held_out}, whose prompts are "
            f"answered, got {evaluation.num_sample_prompts}"
        )
    num_processes = launch.num_nodes * launch.processes_per_node
    training.accumulation_steps(num_processes)
    if warm_start_training is not None:
        warm_start_training.accumulation_steps(num_processes, WARM_START_TRAINING)


def check_settings_task(
    root: str, run: str, job_id: str, service_account: str, warm_start_training: Mapping[str, Any], **given: Any
) -> tuple[str, str]:
    """Name a run and check all that it is started with, as a task of a pipeline; see check_run for what is given.

    Args:
        root: where all runs keep their data.
        run: name of the run; empty: it gets a fresh one.
        job_id: unique to the run.
        service_account: that the tasks of the run should have.
        warm_start_training: empty where the run has no warm start.
        given: the other sections and the plan, by name.

    Returns:
        The name of the run and the address of its settings, for its other tasks.
    """
    # Loaded here: whoever only checks settings on the way to a cluster needs none of it.
    from dice_core.stages.run_settings import write_settings

    run = given_or_new(run, given["promote_as"], job_id)
    sections = {name: given.pop(name) for name in SECTIONS if name in given}
    sections |= {WARM_START_TRAINING: warm_start_training} if warm_start_training else {}
    check_run(root, run, sections, service_account=service_account, **given)
    return run, write_settings(layout.run(root, run), sections, given)

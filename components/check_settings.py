"""Component that checks a run's settings before anything expensive starts."""

from typing import NamedTuple

from components import images
from components.component import component


@component(images.CORE)
def check_settings(
    root: str,
    run: str,
    job_id: str,
    num_iterations: int,
    num_shards: int,
    seed: int,
    promote_as: str,
    policy_source: str,
    reference_source: str,
    preferences_source: str,
    prompts_source: str,
    exclude_source: str,
    judge_source: str,
    reward_source: str,
    chat: dict,
    data: dict,
    generation: dict,
    scoring: dict,
    grading: dict,
    pairing: dict,
    training: dict,
    warm_start_training: dict,
    evaluation: dict,
    judging: dict,
    launch: dict,
    pods: dict,
    service_account: str,
    preset: str = "",
    gpu_hour_price: float = 0.0,
) -> NamedTuple("Checked", [("run", str), ("settings_uri", str)]):
    given = locals()
    from dice_core.stages.check_settings import check_settings_task

    return check_settings_task(**given)

"""Component of the stages generate and score: one shard, in one pod."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.GENERATE, install_kfp_package=False)
def generate_and_score(
    settings_uri: str,
    place: str,
    policy_uri: str,
    reference_uri: str,
    data_uri: str,
    gate_uri: str,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    given = locals()
    from dice_core.stages.generate_and_score import generate_and_score_task

    return generate_and_score_task(**given)

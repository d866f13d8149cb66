"""Component of the score stage: one shard."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def score(
    run_uri: str,
    settings_uri: str,
    place: str,
    policy_uri: str,
    reference_uri: str,
    responses_uri: str,
    reward_uri: str,
    data_uri: str,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    given = locals()
    from dice_core.stages.score import score_task

    return score_task(**given)

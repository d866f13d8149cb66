"""Component of the generate stage: one shard."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.GENERATE, install_kfp_package=False)
def generate(
    run_uri: str,
    settings_uri: str,
    place: str,
    policy_uri: str,
    data_uri: str,
    gate_uri: str,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    given = locals()
    from dice_core.stages.generate import generate_task

    return generate_task(**given)

"""Component of the prepare-data stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def prepare_data(
    root: str,
    run: str,
    preferences_source: str,
    prompts_source: str,
    exclude_source: str,
    policy_uri: str,
    data: dict,
    chat: dict,
    seed: int,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    given = locals()
    from dice_core.stages.prepare_data import prepare_data_task

    return prepare_data_task(**given)

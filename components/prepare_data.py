"""Component of the prepare-data stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def prepare_data(settings_uri: str, place: str, policy_uri: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    given = locals()
    from dice_core.stages.prepare_data import prepare_data_task

    return prepare_data_task(**given)

"""Component of the pair stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def pair(settings_uri: str, place: str, policy_uri: str, data_uri: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    given = locals()
    from dice_core.stages.pair import pair_task

    return pair_task(**given)

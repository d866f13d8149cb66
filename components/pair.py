"""Component of the pair stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def pair(
    root: str,
    run: str,
    iteration: int,
    num_shards: int,
    policy_uri: str,
    data_uri: str,
    pairing: dict,
    chat: dict,
    seed: int,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    given = locals()
    from dice_core.stages.pair import pair_task

    return pair_task(**given)

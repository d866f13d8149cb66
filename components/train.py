"""Component of the train stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def train(settings_uri: str, place: str, policy_uri: str, pairs_uri: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    given = locals()
    from dice_core.stages.train import train_task

    return train_task(**given)

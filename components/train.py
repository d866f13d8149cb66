"""Component of the train stage."""

from kfp import dsl

from components import images
from components.component import component


@component(images.TRAIN)
def train(settings_uri: str, place: str, metrics: dsl.Output[dsl.Metrics]) -> None:
    from dice_core.stages.train import train_task

    train_task(settings_uri, place, metrics)

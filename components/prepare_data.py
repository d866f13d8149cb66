"""Component of the prepare-data stage."""

from kfp import dsl

from components import images
from components.component import component


@component(images.CORE)
def prepare_data(settings_uri: str, place: str, metrics: dsl.Output[dsl.Metrics]) -> None:
    from dice_core.stages.prepare_data import prepare_data_task

    prepare_data_task(settings_uri, place, metrics)

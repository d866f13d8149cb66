"""Component of the pair stage."""

from kfp import dsl

from components import images
from components.component import component


@component(images.CORE)
def pair(settings_uri: str, place: str, metrics: dsl.Output[dsl.Metrics]) -> None:
    from dice_core.stages.pair import pair_task

    pair_task(settings_uri, place, metrics)

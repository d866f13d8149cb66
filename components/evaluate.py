"""Component of the evaluate stage."""

from typing import NamedTuple

from kfp import dsl

from components import images
from components.component import component


@component(images.GENERATE)
def evaluate(settings_uri: str, place: str, metrics: dsl.Output[dsl.Metrics]) -> NamedTuple(
    "Evaluation", [("decision", str)]
):
    from dice_core.stages.evaluate import evaluate_task

    return evaluate_task(settings_uri, place, metrics)

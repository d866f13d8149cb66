"""Component of the stages generate and score: one shard, in one pod."""

from kfp import dsl

from components import images
from components.component import component


@component(images.GENERATE)
def generate_and_score(settings_uri: str, place: str, metrics: dsl.Output[dsl.Metrics]) -> None:
    from dice_core.stages.generate_and_score import generate_and_score_task

    generate_and_score_task(settings_uri, place, metrics)

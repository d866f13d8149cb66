"""Component of the import-model stage."""

from kfp import dsl

from components import images
from components.component import component


@component(images.TRAIN)
def import_model(settings_uri: str, role: str, metrics: dsl.Output[dsl.Metrics]) -> None:
    from dice_core.stages.import_model import import_model_task

    import_model_task(settings_uri, role, metrics)

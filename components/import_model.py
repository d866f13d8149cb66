"""Component of the import-model stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def import_model(
    root: str, run: str, source: str, metrics: dsl.Output[dsl.Metrics], role: str = "", settings_uri: str = ""
) -> str:
    given = locals()
    from dice_core.stages.import_model import import_model_task

    return import_model_task(**given)

"""Component that checks a run's settings before anything expensive starts."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def check_settings(
    chat: dict,
    data: dict,
    generation: dict,
    scoring: dict,
    pairing: dict,
    training: dict,
    warm_start_training: dict,
    evaluation: dict,
    launch: dict,
    pods: dict,
) -> None:
    given = locals()
    from dice_core.stages.check_settings import check_settings_task

    check_settings_task(**given)

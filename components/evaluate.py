"""Component of the evaluate stage."""

from typing import NamedTuple

from kfp import dsl

from components import images


@dsl.component(base_image=images.GENERATE, install_kfp_package=False)
def evaluate(
    settings_uri: str,
    place: str,
    policy_uri: str,
    previous_uri: str,
    base_reference_uri: str,
    first_uri: str,
    judge_uri: str,
    data_uri: str,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Evaluation", [("Output", str), ("decision", str)]):
    given = locals()
    from dice_core.stages.evaluate import evaluate_task

    return evaluate_task(**given)

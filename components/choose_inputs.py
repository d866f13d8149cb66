"""Component that chooses what a recurring run works on."""

from typing import NamedTuple

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def choose_inputs(
    root: str, name: str, job_id: str, promote_as: str, policy_source: str, reference_source: str, prompts_source: str
) -> NamedTuple("Inputs", [("run", str), ("policy_source", str), ("reference_source", str), ("prompts_source", str)]):
    given = locals()
    from dice_core.stages.choose_inputs import choose_inputs_task

    return choose_inputs_task(**given)

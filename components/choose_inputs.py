"""Component that chooses what a recurring run works on."""

from typing import NamedTuple

from components import images
from components.component import component


@component(images.CORE)
def choose_inputs(
    root: str, name: str, job_id: str, promote_as: str, policy_source: str, reference_source: str, prompts_source: str
) -> NamedTuple("Inputs", [("run", str), ("policy_source", str), ("reference_source", str), ("prompts_source", str)]):
    given = locals()
    from dice_core.stages.choose_inputs import choose_inputs_task

    return choose_inputs_task(**given)

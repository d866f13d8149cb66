"""Component that chooses what a recurring run works on."""

from typing import NamedTuple

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def choose_inputs(
    root: str,
    name: str,
    job_id: str,
    promote_as: str,
    policy_source: str,
    reference_source: str,
    prompts_source: str,
) -> NamedTuple("Inputs", [("run", str), ("policy_source", str), ("reference_source", str), ("prompts_source", str)]):
    """Start from the last promoted policy, on the newest prompts, under a name of this run's own.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        name: What the names of the recurring runs begin with.
        job_id: Id that KFP gave this run.
        promote_as: Name of the promoted pointer.
        policy_source: The policy to start from while nothing is promoted.
        reference_source: Its reference. Empty: there must be a promoted policy.
        prompts_source: A prefix that ends in '/' gives the last file or folder below it; anything else is taken as is.

    Returns:
        run: Name of the run.
        policy_source: Policy to start from.
        reference_source: Its reference.
        prompts_source: Prompts to generate on.
    """
    from dice_core.stages.choose_inputs import choose_inputs

    chosen = choose_inputs(
        root,
        name,
        job_id,
        promote_as=promote_as,
        policy_source=policy_source,
        reference_source=reference_source,
        prompts_source=prompts_source,
    )
    return chosen.run, chosen.policy_source, chosen.reference_source, chosen.prompts_source

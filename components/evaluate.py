"""Component of the evaluate stage."""

from typing import NamedTuple

from kfp import dsl

from components import images


@dsl.component(base_image=images.GENERATE, install_kfp_package=False)
def evaluate(
    root: str,
    run: str,
    iteration: int,
    policy_uri: str,
    previous_uri: str,
    base_reference_uri: str,
    data_uri: str,
    promote_as: str,
    evaluation: dict,
    generation: dict,
    chat: dict,
    seed: int,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Evaluation", [("Output", str), ("decision", str)]):
    """Measure the new policy against the one before it; promote it only if it is accepted and better.

    Accepted: neither its held-out accuracy nor the length of its answers breaks a bound of the settings by more than
    noise. Better: its held-out accuracy is higher, or the same with a higher margin. One that is accepted and no better
    goes on and is not promoted; after one that is refused the rest of the run is skipped.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        run: Name of the run.
        iteration: Iteration, from 1.
        policy_uri: The new policy.
        previous_uri: The policy before it.
        base_reference_uri: First reference of the run; the rewards of both policies are taken against it.
        data_uri: Prepared tables with the held-out pairs.
        promote_as: Name of the promoted pointer that an accepted and better policy moves. Empty: none is moved.
        evaluation: Settings of the stage (EvaluationConfig).
        generation: How answers are sampled (GenerationConfig).
        chat: How a prompt becomes token ids (ChatConfig).
        seed: Seed of the run.

    Returns:
        metrics: Held-out accuracy and margin, answer lengths before and after, whether it was accepted, whether it
            improved, and why.
        decision: `accepted` or `refused`; the latter of a policy that was never made too.
        Output: Address of the evaluation.
    """
    from dice_core.stages.evaluate import evaluate
    from dice_core.storage import layout

    report = evaluate(
        policy_uri,
        previous_uri,
        base_reference_uri,
        data_uri,
        layout.stage(layout.run(root, run), iteration, "evaluate"),
        iteration=iteration,
        promoted_uri=layout.promoted(root, promote_as) if promote_as else "",
        evaluation=evaluation,
        generation=generation,
        chat=chat,
        seed=seed,
    )
    metrics.metadata.update(report.metrics, status=report.status, uri=report.uri)
    return report.uri, "accepted" if report.metrics.get("accepted") else "refused"

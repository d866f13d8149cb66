"""Component of the train stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def train(
    root: str,
    run: str,
    iteration: int,
    policy_uri: str,
    pairs_uri: str,
    training: dict,
    launch: dict,
    pods: dict,
    seed: int,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Train the policy on pairs by DPO, with itself as it starts for the reference.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        run: Name of the run.
        iteration: Iteration, from 1; 0 is the warm start.
        policy_uri: Model that training starts from.
        pairs_uri: Preference pairs.
        training: Settings of the stage (TrainingConfig).
        launch: Which processes train (LaunchConfig).
        pods: What their pods look like (PodConfig); empty where this task trains itself.
        seed: Seed of the run.

    Returns:
        metrics: Loss and reward accuracy at start and end, steps, time and memory.
        Output: Address of the new policy.
    """
    from dice_core.stages.train import train
    from dice_core.storage import layout

    run_uri = layout.run(root, run)
    report = train(
        policy_uri,
        pairs_uri,
        layout.stage(run_uri, iteration, "train") if iteration else layout.warm_start(run_uri, "train"),
        iteration=iteration,
        training=training,
        launch=launch,
        pods=pods,
        seed=seed,
    )
    metrics.metadata.update(report.metrics, status=report.status, uri=report.uri)
    return report.uri

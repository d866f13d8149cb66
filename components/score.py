"""Component of the score stage: one shard."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def score(
    root: str,
    run: str,
    iteration: int,
    shard: int,
    num_shards: int,
    policy_uri: str,
    reference_uri: str,
    responses_uri: str,
    scoring: dict,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Compute the log-probs of a shard's valid responses: their difference is the implicit reward.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        run: Name of the run.
        iteration: Iteration, from 1.
        shard: This shard, from 0.
        num_shards: Number of shards.
        policy_uri: Model that made the responses.
        reference_uri: The policy before that one.
        responses_uri: The shard's responses.
        scoring: Settings of the stage (ScoringConfig).

    Returns:
        metrics: Counts of scored and dropped responses, mean and spread of the rewards.
        Output: Address of the shard's scores.
    """
    from dice_core.stages.score import score
    from dice_core.storage import layout

    report = score(
        policy_uri,
        reference_uri,
        responses_uri,
        layout.shard(layout.run(root, run), iteration, "score", shard, num_shards),
        scoring=scoring,
    )
    metrics.metadata.update(report.metrics, status=report.status, uri=report.uri)
    return report.uri

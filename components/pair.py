"""Component of the pair stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def pair(
    root: str,
    run: str,
    iteration: int,
    num_shards: int,
    policy_uri: str,
    data_uri: str,
    pairing: dict,
    chat: dict,
    seed: int,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Choose the length penalty, select the best and the worst response of each prompt, mix in offline pairs.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        run: Name of the run.
        iteration: Iteration, from 1; 0 is the warm start, which has offline pairs only.
        num_shards: Number of shards that were generated and scored; 0 in the warm start.
        policy_uri: Model whose tokenizer turns offline pairs into token ids.
        data_uri: Prepared tables.
        pairing: Settings of the stage (PairingConfig).
        chat: How a prompt becomes token ids (ChatConfig).
        seed: Seed of the run.

    Returns:
        metrics: Counts of pairs, the length penalty and the length gap with and without it.
        Output: Address of the pairs.
    """
    from dice_core.stages.pair import pair
    from dice_core.storage import layout

    run_uri = layout.run(root, run)
    report = pair(
        data_uri,
        policy_uri,
        layout.stage(run_uri, iteration, "pair") if iteration else layout.warm_start(run_uri, "pair"),
        scores_uris=[layout.shard(run_uri, iteration, "score", i, num_shards) for i in range(num_shards)],
        responses_uris=[layout.shard(run_uri, iteration, "generate", i, num_shards) for i in range(num_shards)],
        iteration=iteration,
        pairing=pairing,
        chat=chat,
        seed=seed,
    )
    metrics.metadata.update(report.metrics, status=report.status, uri=report.uri)
    return report.uri

"""Component of the generate stage: one shard."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.GENERATE, install_kfp_package=False)
def generate(
    root: str,
    run: str,
    iteration: int,
    shard: int,
    num_shards: int,
    policy_uri: str,
    data_uri: str,
    gate_uri: str,
    generation: dict,
    chat: dict,
    seed: int,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Sample K responses to each prompt of a shard with the policy.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        run: Name of the run.
        iteration: Iteration, from 1.
        shard: This shard, from 0.
        num_shards: Number of shards.
        policy_uri: Model that answers.
        data_uri: Prepared tables.
        gate_uri: Evaluation of the iteration before; the stage skips when it refused its policy. Empty: no gate.
        generation: Settings of the stage (GenerationConfig).
        chat: How a prompt becomes token ids (ChatConfig).
        seed: Seed of the run.

    Returns:
        metrics: Counts of prompts, responses and tokens, and the time they took.
        Output: Address of the shard's responses.
    """
    from dice_core.stages.generate import generate
    from dice_core.storage import layout

    report = generate(
        policy_uri,
        data_uri,
        layout.shard(layout.run(root, run), iteration, "generate", shard, num_shards),
        iteration=iteration,
        shard=shard,
        num_shards=num_shards,
        gate_uri=gate_uri,
        generation=generation,
        chat=chat,
        seed=seed,
    )
    metrics.metadata.update(report.metrics, status=report.status, uri=report.uri)
    return report.uri

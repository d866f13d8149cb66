"""Component of the prepare-data stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def prepare_data(
    root: str,
    run: str,
    preferences_source: str,
    prompts_source: str,
    exclude_source: str,
    policy_uri: str,
    data: dict,
    chat: dict,
    seed: int,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Check, clean and split preference pairs and prompts.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        run: Name of the run.
        preferences_source: JSONL or Parquet (a file or a folder) or a Hub data set, with prompt, chosen and rejected.
        prompts_source: Prompts to generate on; those of the preference pairs when empty.
        exclude_source: Prompts of benchmarks, left out of the run; may be empty.
        policy_uri: Model whose tokenizer measures the prompts.
        data: Settings of the stage (DataConfig).
        chat: How a prompt becomes token ids (ChatConfig).
        seed: Seed of the run.

    Returns:
        metrics: Counts of what was kept and dropped, and why.
        Output: Address of the prepared tables.
    """
    from dice_core.stages.prepare_data import prepare_data
    from dice_core.storage import layout

    report = prepare_data(
        preferences_source,
        layout.data(layout.run(root, run)),
        policy_uri=policy_uri,
        prompts_source=prompts_source,
        exclude_source=exclude_source,
        data=data,
        chat=chat,
        seed=seed,
    )
    metrics.metadata.update(report.metrics, status=report.status, uri=report.uri)
    return report.uri

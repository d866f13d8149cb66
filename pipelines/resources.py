"""What every task of a compiled pipeline carries beside its work: retries, no caching, its name in the UI.

The one place that configures tasks, so that what a cluster needs (GPUs, node pools, secrets) is added here alone.
"""

from kfp import dsl

LONGEST_TASK_SECONDS = 7 * 24 * 3600
"""Longer than any task: KFP counts the retry window from the start of the first attempt, one hour by default."""


def configure_task(task: dsl.PipelineTask, display_name: str, num_retries: int) -> dsl.PipelineTask:
    """Give a task its display name, its retries, and no cache.

    KFP's cache stays off: a cached success whose data in S3 is gone is worse than a rerun, and a stage whose manifest
    is there returns at once anyway.

    Args:
        task: of a stage.
        display_name: what the UI shows.
        num_retries: further attempts after a failure; each continues where the last one stopped.
    """
    task.set_display_name(display_name)
    task.set_caching_options(enable_caching=False)
    if num_retries:
        task.set_retry(
            num_retries,
            backoff_duration="60s",
            backoff_factor=2.0,
            backoff_max_duration=f"{LONGEST_TASK_SECONDS}s",
        )
    return task

"""Component of the report stage."""

from kfp import dsl

from components import images
from components.component import component


@component(images.CORE)
def report(
    root: str,
    run: str,
    job_id: str,
    num_iterations: int,
    page: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    schedule: str = "",
    promote_as: str = "",
) -> None:
    given = locals()
    from dice_core.stages.report import report_task

    report_task(**given)

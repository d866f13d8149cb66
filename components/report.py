"""Component of the report stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def report(root: str, run: str, job_id: str, num_iterations: int, page: dsl.Output[dsl.HTML]) -> None:
    """Write one page on the run: what was made, dropped, trained and measured, and why.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        run: Name of the run; with a job_id, what the names of recurring runs begin with.
        job_id: Id that KFP gave this run, where the run is a recurring one. Empty: it has a name of its own.
        num_iterations: Number of iterations of the run.

    Returns:
        page: The report, self-contained and under 1 MB.
    """
    from pathlib import Path

    from dice_core.stages.choose_inputs import run_name
    from dice_core.stages.report import report
    from dice_core.storage import layout
    from dice_core.storage.address import open_storage

    run_uri = layout.run(root, run_name(run, job_id) if job_id else run)
    # The run may have failed at its first task: its page says that there is nothing.
    written = report(run_uri, layout.report(run_uri), num_iterations=num_iterations, allow_empty=True)
    open_storage(written.uri).download("report.html", Path(page.path))
    page.metadata.update(written.metrics, uri=written.uri)

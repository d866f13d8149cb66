"""Stage report: one page on a run, written anew each time."""

import json
import tempfile
from pathlib import Path
from typing import Protocol

from dice_core.report.page import build_report
from dice_core.report.run_data import ReportedStage, RunData, collect
from dice_core.report.summary import summary
from dice_core.stages.choose_inputs import run_name
from dice_core.stages.place import Artifact
from dice_core.stages.runner import StageReport
from dice_core.stages.table import PAIR, REPORT, STAGES
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files, read_manifest, require_stage

_PAGE = "report.html"


class PageArtifact(Artifact, Protocol):
    """KFP's artifact of the page."""

    path: str


def report(run_uri: str, output_uri: str, *, num_iterations: int, allow_empty: bool = False) -> StageReport:
    """Write one page on a run: what was made, dropped, trained and measured, and why.

    Always written anew: it shows the state of the run, finished or not.

    Args:
        run_uri: the folder of the run, ROOT/runs/NAME.
        output_uri: where report.html and summary.json go.
        num_iterations: how many iterations the run has.
        allow_empty: also write the page of a run that has made nothing yet.

    Raises:
        StorageError: the run has made nothing, or the place holds another stage's result.
    """
    layout.check_count(num_iterations, "num_iterations")
    if present := read_manifest(output_uri):
        require_stage(present, REPORT.name, output_uri)
    data = read_run(run_uri, num_iterations)
    if data.is_empty and not allow_empty:
        raise StorageError(
            f"{run_uri}: no stage of a run has finished there: give the run's own place, ROOT/runs/NAME, or pass "
            "--allow-empty for a page that says so"
        )
    _publish(data, output_uri)
    return StageReport(output_uri, "completed", {})


def read_run(run_uri: str, num_iterations: int, *, tables: bool = True) -> RunData:
    """Return what a run has made so far, stage by stage in the order of the table; see run_data.collect."""
    # The pair stage names the shards that it has read.
    groups = {maker: name for name, makers in PAIR.inputs.items() for maker in makers}
    stages = [
        ReportedStage(stage.name, stage.in_warm_start, groups[stage.name] if stage.scope == "shard" else "")
        for stage in STAGES.values()
        if stage.scope != "run"
    ]
    return collect(run_uri, num_iterations, stages, tables=tables)


def _publish(data: RunData, output_uri: str) -> None:
    with tempfile.TemporaryDirectory(prefix="dice-") as folder:
        page, numbers = Path(folder) / _PAGE, Path(folder) / "summary.json"
        page.write_text(build_report(data))
        numbers.write_text(json.dumps(summary(data), indent=1))
        manifest = Manifest(stage=REPORT.name, fingerprint="", files={}, inputs={"run": data.uri})
        publish_files(output_uri, {page.name: page, numbers.name: numbers}, manifest)


def report_task(root: str, run: str, job_id: str, num_iterations: int, page: PageArtifact) -> None:
    """Write the page of a run, as the last task of a pipeline; with a job_id, of the recurring run of that id."""
    uri = layout.run(root, run_name(run, job_id) if job_id else run)
    # The run may have failed at its first task: its page says that there is nothing.
    written = report(uri, layout.report(uri), num_iterations=num_iterations, allow_empty=True)
    open_storage(written.uri).download(_PAGE, Path(page.path))
    page.metadata.update(written.metrics, uri=written.uri)

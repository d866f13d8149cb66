"""Stage report: one page on a run, written anew each time.

The last task of a run writes it, and so does every stage that has measured a policy or failed (attempts.py): a run that
is retried has no last task. The histograms of an iteration, for which large tables are read, are made once and kept
beside the page.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from dice_core.progress import log
from dice_core.report.page import build_report
from dice_core.report.run_data import Details, Histogram, ReportedStage, RunData, collect
from dice_core.report.summary import summary
from dice_core.settings.base import ConfigError
from dice_core.stages.place import Artifact, Place, is_place_of
from dice_core.stages.recurring_name import continued_or_new, given_or_new
from dice_core.stages.run_status import run_status
from dice_core.stages.runner import StageReport
from dice_core.stages.stages_elsewhere import gathered
from dice_core.stages.table import CHECK_SETTINGS, IMPORT_MODEL, PAIR, REPORT, STAGES, is_of_pipeline
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import MissingObjectError, StorageError
from dice_core.storage.manifest import Manifest, publish_files, read_manifest, require_stage
from dice_core.storage.run_contents import RunContents, read_contents
from dice_core.storage.stored_record import read_record
from dice_core.tracking.run_tracking import end_run

NUM_ITERATIONS = "num_iterations"
"""What check-settings writes down of the plan, for the pages that stages write."""
_HISTOGRAMS = "histograms.json"


@dataclass(frozen=True)
class _Kept:
    """Histograms of a page, by what they were made from."""

    histograms: dict[str, dict[str, Histogram]] = field(default_factory=dict)


_PAGE = "report.html"


class PageArtifact(Artifact, Protocol):
    """KFP's artifact of the page."""

    path: str


def report(
    *,
    output_uri: str,
    run_uri: str = "",
    stages_uris: Sequence[str] = (),
    num_iterations: int = 0,
    allow_empty: bool = False,
) -> StageReport:
    """Write one page on a run: what was made, dropped, trained and measured, and why.

    Always written anew: it shows the state of the run, finished or not.

    Args:
        output_uri: where report.html and summary.json go.
        run_uri: the folder of the run, ROOT/runs/NAME.
        stages_uris: results of single stages, wherever they lie, in place of a run.
        num_iterations: how many iterations the run has; 0: as many as were planned or have begun.
        allow_empty: also write the page of a run that has made nothing yet.

    Raises:
        StorageError: the run has made nothing, a stage's result lies where no report looks, or the place holds another
            stage's result.
        ConfigError: neither a run nor stages are given, or both.
    """
    layout.check_count(num_iterations, "num_iterations", 0)
    if bool(run_uri) == bool(stages_uris):
        raise ConfigError("report: give either the run (--run ROOT/runs/NAME) or addresses of stages (--stages)")
    contents = read_contents(run_uri) if run_uri else gathered(stages_uris)
    if not allow_empty:
        # The last task of a run writes its page whatever lies beside its results.
        _refuse_misplaced(contents)
    data = _read(contents, output_uri, num_iterations or _num_iterations(contents), "all")
    if data.is_empty and not allow_empty:
        raise StorageError(
            f"{run_uri}: no stage of a run has finished there: give the run's own place, ROOT/runs/NAME, or pass "
            "--allow-empty for a page that says so"
        )
    _publish(data, output_uri)
    if status := run_status(contents, num_iterations):
        end_run(run_uri, status)
    return StageReport(output_uri, "completed", {})


def _refuse_misplaced(contents: RunContents) -> None:
    """Refuse results at places that are not a run's own: the page would say that they are missing.

    Shards that a stage at its own place has read are found by its manifest, wherever they lie.
    """
    stages = {place: STAGES.get(manifest.stage) for place, manifest in contents.manifests.items()}
    in_place = [place for place, stage in stages.items() if stage and is_place_of(stage, place)]
    inputs = (uri for place in in_place for uri in contents.manifests[place].inputs.values())
    read = {uri.rpartition("@")[0] for uri in inputs}
    for place, stage in stages.items():
        # A model may lie anywhere, and so may a page.
        if stage in (None, IMPORT_MODEL, REPORT) or place in in_place or layout.join(contents.uri, place) in read:
            continue
        iteration = None if stage.scope == "run" else 1
        wanted = Place(stage.name, iteration, 0 if stage.scope == "shard" else None).below
        raise StorageError(
            f"{layout.join(contents.uri, place)}: holds the result of {stage.name}, and a report does not look there: "
            f"give the addresses of the stages (--stages), or move it to {layout.join(contents.uri, wanted)}"
        )


def update_report(run_uri: str, *, details: Details) -> None:
    """Write the page of a run that goes on, at its own place.

    Args:
        run_uri: the folder of the run.
        details: read beside the manifests. With "small", no histogram is made that an earlier page had not.
    """
    contents, output_uri = read_contents(run_uri), layout.report(run_uri)
    _publish(_read(contents, output_uri, _num_iterations(contents), details), output_uri)


def read_run(run_uri: str, num_iterations: int, *, tables: bool = True) -> RunData:
    """Return what a run has made so far, stage by stage in the order of the table; see run_data.collect."""
    return _collect(read_contents(run_uri), num_iterations, "all" if tables else "none")


def _read(contents: RunContents, output_uri: str, num_iterations: int, details: Details) -> RunData:
    if present := read_manifest(output_uri):
        require_stage(present, REPORT.name, output_uri)
    return _collect(contents, num_iterations, details, _kept_histograms(output_uri))


def _collect(
    contents: RunContents,
    num_iterations: int,
    details: Details,
    known: Mapping[str, Mapping[str, Histogram]] | None = None,
) -> RunData:
    # The pair stage names the shards that it has read.
    groups = {maker: name for name, makers in PAIR.inputs.items() for maker in makers}
    stages = [
        ReportedStage(stage.name, stage.in_warm_start, groups[stage.name] if stage.scope == "shard" else "")
        for stage in STAGES.values()
        if stage.scope != "run" and not stage.parts and is_of_pipeline(stage.name)
    ]
    return collect(contents, num_iterations, stages, details=details, known=known or {})


def _num_iterations(contents: RunContents) -> int:
    """Return how many iterations a run has: as planned, where that was written down, and as many as have begun."""
    checked = contents.manifests.get(CHECK_SETTINGS.name)
    planned = checked.settings.get(NUM_ITERATIONS, 1) if checked else 1
    return max(planned, *(layout.iteration_of(key) or 0 for key in contents.keys), 1)


def _kept_histograms(output_uri: str) -> dict[str, dict[str, Histogram]]:
    try:
        return read_record(_Kept, open_storage(output_uri).read_bytes(_HISTOGRAMS), output_uri).histograms
    except MissingObjectError:
        return {}
    except ValueError as error:
        log(f"report: {layout.join(output_uri, _HISTOGRAMS)}: not read, and made again: {error}")
        return {}


def _publish(data: RunData, output_uri: str) -> None:
    with tempfile.TemporaryDirectory(prefix="dice-") as folder:
        files = {name: Path(folder) / name for name in (_PAGE, "summary.json", _HISTOGRAMS)}
        files[_PAGE].write_text(build_report(data))
        files["summary.json"].write_text(json.dumps(summary(data), indent=1))
        kept = _Kept({key: dict(histograms) for key, histograms in data.histograms.items()})
        files[_HISTOGRAMS].write_text(json.dumps(asdict(kept)))
        manifest = Manifest(stage=REPORT.name, fingerprint="", files={}, inputs={"run": data.uri})
        publish_files(output_uri, files, manifest)


def report_task(
    root: str, run: str, job_id: str, num_iterations: int, page: PageArtifact, schedule: str, promote_as: str
) -> None:
    """Write the page of a run, as the last task of a pipeline.

    Args:
        root: where all runs keep their data.
        run: name of the run; empty: it has a fresh one.
        job_id: unique to the run.
        num_iterations: of the run.
        page: KFP's artifact.
        schedule: what the names of recurring runs begin with; empty in a run that was started by hand.
        promote_as: name of the promoted pointer.
    """
    name = continued_or_new(root, schedule, job_id) if schedule else given_or_new(run, promote_as, job_id)
    uri = layout.run(root, name)
    # The run may have failed at its first task: its page says that there is nothing.
    written = report(output_uri=layout.report(uri), run_uri=uri, num_iterations=num_iterations, allow_empty=True)
    if run_status(read_contents(uri), num_iterations) is None:
        # It comes last: nobody works on the run any more.
        end_run(uri, "KILLED")
    open_storage(written.uri).download(_PAGE, Path(page.path))
    page.metadata.update(written.metrics, uri=written.uri)

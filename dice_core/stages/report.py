"""Stage report: one page on a run, or one that compares several, written anew each time.

The last task of a run writes it, and so does every stage that has measured a policy or failed (attempts.py): a run that
is retried has no last task. The histograms of an iteration, for which large tables are read, are made once and kept
beside the page.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dice_core.progress import log
from dice_core.report.comparison import MOST_RUNS, build_comparison, compare
from dice_core.report.headline import headline_numbers, markdown_table
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
_PAGE, _SUMMARY, _HISTOGRAMS = "report.html", "summary.json", "histograms.json"


@dataclass(frozen=True)
class _Kept:
    """Histograms of a page, by what they were made from."""

    histograms: dict[str, dict[str, Histogram]] = field(default_factory=dict)


class FileArtifact(Artifact, Protocol):
    """A KFP artifact that is a file."""

    path: str


def report(
    *,
    output_uri: str,
    run_uri: str = "",
    stages_uris: Sequence[str] = (),
    runs_uris: Sequence[str] = (),
    num_iterations: int = 0,
    gpu_hour_price: float = 0.0,
    allow_empty: bool = False,
) -> StageReport:
    """Write one page on a run, or one that compares several: what was made, trained and measured, and the verdict.

    Always written anew: it shows the state of the run, finished or not.

    Args:
        output_uri: where report.html and summary.json go.
        run_uri: the folder of the run, ROOT/runs/NAME.
        stages_uris: results of single stages, wherever they lie, in place of a run.
        runs_uris: in place of one run, those to compare; the output is then no run's own place.
        num_iterations: how many iterations the run has; 0: as many as were planned or have begun.
        gpu_hour_price: of one GPU, in any currency, for the cost of the run; 0: as it was planned.
        allow_empty: also write the page of a run that has made nothing yet.

    Raises:
        ConfigError: the arguments do not fit each other.
        StorageError: a run has made nothing, a stage's result lies where no report looks, or the place holds another
            stage's result.
    """
    layout.check_count(num_iterations, "num_iterations", minimum=0)
    _check_runs(run_uri, output_uri, stages_uris, runs_uris)
    if not 0 <= gpu_hour_price < math.inf:
        raise ConfigError(f"--gpu-hour-price: must be a number of at least 0, got {gpu_hour_price}")
    if runs_uris:
        return _report_comparison(runs_uris, output_uri, gpu_hour_price)
    contents = read_contents(run_uri) if run_uri else gathered(stages_uris)
    num_iterations = num_iterations or _num_iterations(contents)
    if not allow_empty:
        # The last task of a run writes its page whatever lies beside its results.
        _refuse_misplaced(contents)
    data = _read(contents, output_uri, num_iterations, "all")
    if data.is_empty and not allow_empty:
        raise StorageError(f"{_nothing_at(run_uri)}, or pass --allow-empty for a page that says so")
    _publish(data, output_uri, gpu_hour_price)
    if run_uri and (status := run_status(contents, num_iterations)):
        end_run(run_uri, status)
    return StageReport(output_uri, "completed", {})


def _check_runs(run_uri: str, output_uri: str, stages_uris: Sequence[str], runs_uris: Sequence[str]) -> None:
    """Raise ConfigError where the arguments do not fit each other."""
    if sum(map(bool, (run_uri, stages_uris, runs_uris))) != 1:
        raise ConfigError(
            "report: give one of --run (ROOT/runs/NAME), --stages (addresses of stages) and --runs (those to compare)"
        )
    if runs_uris and not 2 <= len(set(runs_uris)) == len(runs_uris) <= MOST_RUNS:
        raise ConfigError(f"--runs: must be 2 to {MOST_RUNS} different runs, got {len(runs_uris)}")
    if runs_uris and layout.run_of(layout.join(output_uri, "")):
        raise ConfigError(f"--output: a comparison belongs to no run, give a place of its own, got {output_uri}")


def _nothing_at(run_uri: str) -> str:
    return f"{run_uri}: no stage of a run has finished there: give the run's own place, ROOT/runs/NAME"


def _report_comparison(runs_uris: Sequence[str], output_uri: str, gpu_hour_price: float) -> StageReport:
    if present := read_manifest(output_uri):
        require_stage(present, REPORT.name, output_uri)
    runs = [read_run(uri, details="small") for uri in runs_uris]
    if missing := next((run.uri for run in runs if run.is_empty), ""):
        raise StorageError(_nothing_at(missing))
    comparison = compare([summary(run, gpu_hour_price=gpu_hour_price) for run in runs])
    inputs = {f"runs/{i}": run.uri for i, run in enumerate(runs)}
    _publish_texts(output_uri, {_PAGE: build_comparison(runs, comparison), _SUMMARY: _json(comparison)}, inputs)
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


def read_run(run_uri: str, num_iterations: int = 0, *, details: Details = "all") -> RunData:
    """Return what a run has made so far, stage by stage in the order of the table; see run_data.collect.

    Args:
        run_uri: where the run is.
        num_iterations: as in `report`.
        details: read beside the manifests.
    """
    contents = read_contents(run_uri)
    return _collect(contents, num_iterations or _num_iterations(contents), details)


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


def _publish(data: RunData, output_uri: str, gpu_hour_price: float = 0) -> None:
    numbers = summary(data, gpu_hour_price=gpu_hour_price)
    kept = _Kept({key: dict(histograms) for key, histograms in data.histograms.items()})
    texts = {_PAGE: build_report(data, numbers), _SUMMARY: _json(numbers), _HISTOGRAMS: json.dumps(asdict(kept))}
    _publish_texts(output_uri, texts, {"run": data.uri})


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, allow_nan=False)


def _publish_texts(output_uri: str, texts: Mapping[str, str], inputs: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="dice-") as folder:
        files = {name: Path(folder) / name for name in texts}
        for name, path in files.items():
            path.write_text(texts[name])
        publish_files(output_uri, files, Manifest(stage=REPORT.name, fingerprint="", files={}, inputs=inputs))


def read_summary(report_uri: str) -> dict[str, Any]:
    """Return the numbers of the page at an address."""
    found: dict[str, Any] = json.loads(open_storage(report_uri).read_bytes(_SUMMARY))
    return found


def report_task(
    root: str,
    run: str,
    job_id: str,
    num_iterations: int,
    page: FileArtifact,
    table: FileArtifact,
    metrics: Artifact,
    schedule: str,
    promote_as: str,
) -> None:
    """Write the page of a run, as the last task of a pipeline.

    Args:
        root: where all runs keep their data.
        run: name of the run; empty: it has a fresh one.
        job_id: unique to the run.
        num_iterations: of the run.
        page: KFP's artifact of the page.
        table: that of a small table in Markdown, for the view that compares runs.
        metrics: that of the numbers that decide.
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
    page.metadata.update(uri=written.uri)
    numbers = read_summary(written.uri)
    Path(table.path).write_text(markdown_table(numbers))
    metrics.metadata.update(headline_numbers(numbers), outcome=numbers["verdict"]["outcome"])

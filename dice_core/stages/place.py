"""The place of a task in a run: its stage, iteration and shard. From it follow its address, its key and its name.

A pipeline, the state of a run and a stage's own task all ask here. Loads no torch.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Protocol

from dice_core.stages.runner import StageReport
from dice_core.stages.table import CHECK_SETTINGS, CHOOSE_INPUTS, PREPARE_DATA, REPORT, STAGES, Stage
from dice_core.storage import layout
from dice_core.storage.manifest import Metric

WARM_START = 0
"""The iteration that makes a run's first policy."""
MAX_SHOWN = 15
"""Numbers of a task: more than these nobody reads in the UI, and the page has them all."""
_OF_RUN = {
    CHECK_SETTINGS.name: layout.check_settings,
    CHOOSE_INPUTS.name: layout.choose_inputs,
    PREPARE_DATA.name: layout.data,
    REPORT.name: layout.report,
}


@dataclass(frozen=True)
class Place:
    """A stage in a run; in an iteration and a shard of it where the stage has these."""

    stage: str
    iteration: int | None = None
    """From 1; 0 is the warm start."""
    shard: int | None = None
    """From 0."""
    num_shards: int = 1

    @classmethod
    def parse(cls, below: str) -> "Place":
        """Return the place that has an address below its run, such as iteration-1/score/shard-2-of-8."""
        found = layout.parse_place(below)
        if found and found.iteration is not None:
            shard, num_shards = found.shard or (None, 1)
            return cls(found.stage, found.iteration, shard, num_shards)
        return cls(next((name for name, place in _OF_RUN.items() if place("") == f"/{below}"), below))

    @property
    def parts(self) -> tuple["Place", ...]:
        """The places where the task leaves its results: this one, or those of the stages that it runs."""
        stage = STAGES.get(self.stage)
        return tuple(self.of(STAGES[name]) for name in stage.parts) if stage and stage.parts else (self,)

    def of(self, stage: Stage) -> "Place":
        """Return the place of another stage in the same iteration and shard."""
        return replace(self, stage=stage.name)

    def uri(self, root: str, run: str) -> str:
        """Return where the stage writes; empty where that is no place of the run's own."""
        return self._in(layout.run(root, run))

    @property
    def below(self) -> str:
        """Where the stage writes, relative to its run; empty where that is no place of the run's own."""
        return self._in("").removeprefix("/")

    def _in(self, run_uri: str) -> str:
        if self.iteration is None:
            return _OF_RUN[self.stage](run_uri) if self.stage in _OF_RUN else ""
        if self.iteration == WARM_START:
            return layout.warm_start(run_uri, self.stage)
        if self.shard is None:
            return layout.stage(run_uri, self.iteration, self.stage)
        return layout.shard(run_uri, self.iteration, self.stage, self.shard, self.num_shards)

    @property
    def key(self) -> str:
        """The task's key, unique in its pipeline: KFP's UI finds artifacts by it."""
        shard = "" if self.shard is None else f"-{self.shard + 1}"
        return self._frame("-").replace(" ", "-") + self.stage + shard

    @property
    def title(self) -> str:
        """What people call the task where its iteration is known, such as `score 3 of 8`."""
        shard = "" if self.shard is None else f" {self.shard + 1} of {self.num_shards}"
        return self.stage.replace("-", " ") + shard

    @property
    def label(self) -> str:
        """What people call the task in a run, such as `iteration 2: score 3 of 8`."""
        return self._frame(": ") + self.title

    def _frame(self, end: str) -> str:
        if self.iteration is None:
            return ""
        return (f"iteration {self.iteration}" if self.iteration else "warm start") + end


def is_place_of(stage: Stage, below: str) -> bool:
    """Return whether a place below a run is one of a stage's own."""
    if stage.scope == "run":
        return below == Place(stage.name).below
    found = layout.parse_place(below)
    if found is None or found.stage != stage.name or found.iteration is None:
        return False
    return (found.shard is not None) == (stage.scope == "shard")


class Artifact(Protocol):
    """A KFP artifact, as a task fills it."""

    metadata: MutableMapping[str, Any]


def show(report: StageReport, place: Place, artifact: Artifact) -> None:
    """Put a stage's metrics into its task's artifact, with whose they are and the stage's address."""
    _fill(artifact, _of_most_interest(report.metrics, place.stage), report.status, report.uri, place)


def _of_most_interest(metrics: Mapping[str, Metric], stage: str) -> dict[str, Metric]:
    """Return the stage's own choice first, then the others in their order, with at most so many numbers."""
    first = [name for name in STAGES[stage].shown if name in metrics]
    ordered = {name: metrics[name] for name in [*first, *metrics]}
    numbers = [name for name, value in ordered.items() if isinstance(value, int | float) and isfinite(value)]
    left_out = set(numbers[MAX_SHOWN:])
    return {name: value for name, value in ordered.items() if name not in left_out}


def show_parts(reports: Sequence[tuple[Stage, StageReport]], place: Place, artifact: Artifact) -> None:
    """Put the metrics of the stages of one task into its artifact, each with its stage's name in front.

    The ones that a person looks at come first, then those that are not 0, up to MAX_SHOWN. The address is that of the
    last stage.

    Args:
        reports: of the stages, in the order in which they ran.
        place: of the task.
        artifact: of the task.
    """
    found = {
        f"{stage.name}_{name}": (name not in stage.shown, value == 0, value)
        for stage, report in reports
        for name, value in report.metrics.items()
    }
    names = sorted(found, key=lambda name: found[name][:2])[:MAX_SHOWN]
    statuses = [report.status for _, report in reports]
    status = next((one for one in ("skipped", "completed") if one in statuses), "already complete")
    _fill(artifact, {name: found[name][2] for name in names}, status, reports[-1][1].uri, place)


def _fill(artifact: Artifact, metrics: Mapping[str, Any], status: str, uri: str, place: Place) -> None:
    """Fill an artifact; KFP's launcher fails a task for a metric that is null or not finite: those are text."""
    shown = {
        name: "?" if value is None else str(value) if isinstance(value, float) and not isfinite(value) else value
        for name, value in metrics.items()
    }
    artifact.metadata.update(shown, status=status, uri=uri, task=place.label)

"""Runs in MLflow: one for a run of ours, and one below it for each stage. Found again by their tags.

Several processes write to the same ones: shards side by side, the launcher of a training and its rank 0, an attempt
and the one after it. MLflow has no conditional creation: who has created a run that others may create too looks again a
moment later, and of several the oldest stays.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dice_core.progress import log, one_line
from dice_core.tracking.feed import Line, Status
from dice_core.tracking.mlflow_api import MlflowApi, MlflowError
from dice_core.tracking.system_metrics import PREFIX as SYSTEM_PREFIX

DEFAULT_EXPERIMENT = "dice"
URI_TAG, FINGERPRINT_TAG = "dice.uri", "dice.fingerprint"
"""Where a run's results are, and of a stage what decides them: the same again is the same run."""
PARENT_TAG = "mlflow.parentRunId"
# MLflow's limits of a request.
_MAX_METRICS, _MAX_PARAMS = 1000, 100
_MAX_PARAM_CHARACTERS = 6000
# Longer than a search and a creation take.
_SETTLE_SECONDS = 2.0

Item = TypeVar("Item")


@dataclass(frozen=True)
class RunKey:
    """Which run is meant."""

    name: str
    """What MLflow's pages call it."""
    tags: Mapping[str, str]
    """What it is found by."""
    parent: "RunKey | None" = None


@dataclass(frozen=True)
class _Found:
    """A run as the server has it."""

    run_id: str
    status: str = ""
    start_milliseconds: int = 0
    params: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    """The highest step of each metric."""

    @classmethod
    def read(cls, run: Mapping[str, Any]) -> "_Found":
        info, data = run["info"], run.get("data", {})
        return cls(
            run_id=str(info["run_id"]),
            status=str(info.get("status", "")),
            start_milliseconds=int(info.get("start_time", 0)),
            params={entry["key"]: entry.get("value", "") for entry in data.get("params", [])},
            steps={entry["key"]: int(entry.get("step", 0)) for entry in data.get("metrics", [])},
        )


class MlflowRuns:
    """The runs of the experiment that MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID names."""

    def __init__(self, api: MlflowApi, environment: Mapping[str, str]) -> None:
        """Take the server and the variables."""
        self.api = api
        self._name, self._id = (environment.get(f"MLFLOW_EXPERIMENT_{what}", "") for what in ("NAME", "ID"))

    def find_or_create(self, key: RunKey, tags: Mapping[str, str], *, is_shared: bool = False) -> _Found:
        """Return the run of a key, its parent before it; a new one gets the tags.

        Args:
            key: of the run.
            tags: more of them.
            is_shared: whether another process may be creating it just now. A parent always is: shards begin at once
                where check-settings could not create it.
        """
        experiment = self._experiment()
        parent = self.find_or_create(key.parent, {}, is_shared=True).run_id if key.parent else ""
        if found := self._find(experiment, key.tags):
            return found
        named = {"mlflow.runName": key.name, **({PARENT_TAG: parent} if parent else {})}
        created = self.api.post(
            "runs/create",
            experiment_id=experiment,
            run_name=key.name,
            start_time=_milliseconds(time.time()),
            tags=_pairs({**named, **tags, **key.tags}),
        )["run"]
        own = _Found.read(created)
        return self._oldest(experiment, key, own) if is_shared else own

    def _oldest(self, experiment: str, key: RunKey, own: _Found) -> _Found:
        # Who has looked before this one was there has created its own by then.
        time.sleep(_SETTLE_SECONDS)
        first = self._find(experiment, key.tags)
        if first is None or first.run_id == own.run_id:
            return own
        self.api.post("runs/delete", run_id=own.run_id)
        return first

    def read(self, run_id: str) -> _Found:
        """Return a run as it is now."""
        return _Found.read(self.api.get("runs/get", run_id=run_id)["run"])

    def update(self, run_id: str, status: str) -> None:
        """Set the status of a run; any but RUNNING ends it now."""
        ended = {} if status == "RUNNING" else {"end_time": _milliseconds(time.time())}
        self.api.post("runs/update", run_id=run_id, status=status, **ended)

    def log(self, run_id: str, lines: Sequence[Line]) -> None:
        """Store metrics."""
        metrics = [
            {"key": name, "value": value, "step": line.step, "timestamp": _milliseconds(line.time)}
            for line in lines
            for name, value in line.values.items()
        ]
        for some in _chunks(metrics, _MAX_METRICS):
            self.api.post("runs/log-batch", run_id=run_id, metrics=some)

    def log_params(self, found: _Found, params: Mapping[str, str]) -> None:
        """Store the params that the run does not have yet: MLflow lets none change."""
        missing = {name: value[:_MAX_PARAM_CHARACTERS] for name, value in params.items() if name not in found.params}
        try:
            for some in _chunks(_pairs(missing), _MAX_PARAMS):
                self.api.post("runs/log-batch", run_id=found.run_id, params=some)
        except MlflowError as error:
            if not error.is_final:
                raise
            # An older server takes shorter values: no reason to lose the curves.
            log(f"mlflow: {self.api.where}: some params are not stored: {one_line(error)}")

    def running_below(self, parent: str) -> list[str]:
        """Return the ids of the runs below another that are not said to have ended."""
        query = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = 'RUNNING'"
        found = self.api.post("runs/search", experiment_ids=[self._experiment()], filter=query, max_results=1000)
        return [str(run["info"]["run_id"]) for run in found.get("runs", [])]

    def _find(self, experiment: str, tags: Mapping[str, str]) -> _Found | None:
        query = " and ".join(f"tags.`{name}` = {_quoted(value)}" for name, value in tags.items())
        answer = self.api.post("runs/search", experiment_ids=[experiment], filter=query, max_results=100)
        found = [_Found.read(run) for run in answer.get("runs", [])]
        return min(found, key=lambda run: (run.start_milliseconds, run.run_id), default=None)

    def _experiment(self) -> str:
        if self._id and not self._name:
            return self._id
        name = self._name or DEFAULT_EXPERIMENT
        try:
            found = self.api.get("experiments/get-by-name", experiment_name=name)["experiment"]
            if found.get("lifecycle_stage") == "deleted":
                raise MlflowError(
                    f"experiment {name!r} is deleted: restore it, or set MLFLOW_EXPERIMENT_NAME", is_final=True
                )
            self._name, self._id = "", str(found["experiment_id"])
        except MlflowError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._create_experiment(name)
            return self._experiment()
        return self._id

    def _create_experiment(self, name: str) -> None:
        try:
            self.api.post("experiments/create", name=name)
        except MlflowError as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise


class MlflowRun:
    """One run of a stage, or of a whole run. See Tracker."""

    seconds = 5.0

    def __init__(
        self,
        runs: MlflowRuns,
        key: RunKey,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        is_owner: bool = True,
        parent_summary: Mapping[str, int] | None = None,
    ) -> None:
        """Take which run is meant, and what is known of it.

        Args:
            runs: of an experiment.
            key: of the run.
            params: settings, nested.
            tags: more of them.
            is_owner: whether this process says when the run begins and ends; others add curves.
            parent_summary: a prefix and a step: the numbers at the end are the parent's too, under these.
        """
        self.title = f"mlflow: {runs.api.where}"
        self._runs, self._key, self._is_owner = runs, key, is_owner
        self._params, self._tags = dict(flat(params or {})), dict(tags or {})
        self._parent_summary = dict(parent_summary or {})
        self._found, self._system_start = _Found(""), 0

    def begin(self) -> None:
        """Find the run or create it; what ended goes on."""
        found = self._runs.find_or_create(self._key, self._tags, is_shared=not self._is_owner)
        if self._is_owner:
            for key in (self._key, self._key.parent):
                run = found if key is self._key else self._runs.find_or_create(key, {}) if key else None
                if run and run.status != "RUNNING":
                    self._runs.update(run.run_id, "RUNNING")
            if self._tags:
                self._runs.api.post("runs/log-batch", run_id=found.run_id, tags=_pairs(self._tags))
            self._runs.log_params(found, self._params)
        self._found = found
        last = max((step for name, step in found.steps.items() if name.startswith(SYSTEM_PREFIX)), default=-1)
        self._system_start = last + 1

    def send(self, lines: Sequence[Line]) -> None:
        """Store lines; steps that an earlier attempt has stored are left as they are."""
        self._runs.log(self._found.run_id, [self._new(line) for line in lines])

    def _new(self, line: Line) -> Line:
        if all(name.startswith(SYSTEM_PREFIX) for name in line.values):
            # Measurements are numbered by each attempt.
            return Line(line.step + self._system_start, line.values, line.time)
        known = self._found.steps
        return Line(
            line.step, {name: v for name, v in line.values.items() if line.step > known.get(name, -1)}, line.time
        )

    def end(self, status: Status, summary: Mapping[str, float]) -> None:
        """Store the numbers of the whole work and how it ended."""
        if not self._is_owner:
            return
        self._add_once(self._found.run_id, 0, summary)
        for prefix, step in self._parent_summary.items() if self._key.parent else ():
            parent = self._runs.find_or_create(self._key.parent, {})  # type: ignore[arg-type]
            self._add_once(parent.run_id, step, {f"{prefix}{name}": value for name, value in summary.items()})
        self._runs.update(self._found.run_id, status)

    def _add_once(self, run_id: str, step: int, values: Mapping[str, float]) -> None:
        """Store numbers whose names have no value at that step or a later one: a curve of the same name stays whole."""
        known = self._runs.read(run_id).steps
        new = {name: value for name, value in values.items() if known.get(name, -1) < step}
        if new:
            self._runs.log(run_id, [Line(step, new)])


class MlflowEnd:
    """The end of a run of ours, told by its last task. See Tracker."""

    seconds = 5.0

    def __init__(self, runs: MlflowRuns, key: RunKey, tags: Mapping[str, str]) -> None:
        """Take the run."""
        self.title = f"mlflow: {runs.api.where}"
        self._runs, self._key, self._tags, self._run_id = runs, key, tags, ""

    def begin(self) -> None:
        """Find the run."""
        self._run_id = self._runs.find_or_create(self._key, self._tags).run_id

    def send(self, lines: Sequence[Line]) -> None:
        """Take none."""

    def end(self, status: Status, summary: Mapping[str, float]) -> None:
        """End the run, and the stages whose processes are gone without a word."""
        for run_id in self._runs.running_below(self._run_id):
            self._runs.update(run_id, "KILLED")
        self._runs.update(self._run_id, status)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as `section.name` and text; what is no mapping of names is JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": name, "value": value} for name, value in values.items()]


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))

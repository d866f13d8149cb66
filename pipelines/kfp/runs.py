"""`make status`, `make retry`, and how a run is followed: its tasks, by our names, and their states.

Kubeflow Pipelines reports a flat list of all it started: drivers, executors, and graphs among the tasks. The compiled
pipeline says which of them are tasks. cluster/logs.py shows logs, cancel.py stops a run.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.settings.durations import show_duration
from dice_core.stages import recurring_name as recurring
from dice_core.storage import layout
from pipelines.cluster.jobs import own_name, parameters_of
from pipelines.cluster.pods import waiting_pods
from pipelines.kfp.api import Connection, KfpApi, KfpError

POLL_SECONDS = 10.0
_PATIENCE_SECONDS = 600.0
_WAITING = "waiting"
_MARKS = {"SUCCEEDED": "ok", "SKIPPED": "skipped", "FAILED": "FAILED", "RUNNING": "running", "PENDING": "pending"}
FINAL = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
_SHOWN_RUNS = 10


@dataclass(frozen=True)
class TaskState:
    """A task of a run: what people call it, its state, how long it has been at it, why it failed."""

    label: str
    state: str
    seconds: float = 0.0
    error: str = ""

    def __str__(self) -> str:
        """Return one line."""
        spent = f"  {show_duration(self.seconds)}" if self.seconds else ""
        error = f"  {self.error}" if self.error else ""
        return f"{self.label:<28} {_MARKS.get(self.state, self.state.lower())}{spent}{error}"


@dataclass(frozen=True)
class TaskName:
    """A task of a compiled pipeline: KFP's name of it, ours, and the conditions that it is inside of."""

    key: str
    label: str
    conditions: frozenset[str] = frozenset()


def status(options: argparse.Namespace) -> int:
    """Show the newest run of a name with its tasks, or without a name the latest runs; 1 if the run has failed."""
    connection = Connection.from_environment(options.host, options.namespace)
    api = KfpApi(connection)
    if not options.run:
        for run in api.runs()[:_SHOWN_RUNS]:
            print(f"{run.display_name:<40} {run.state:<10} {run.created_at:%Y-%m-%d %H:%M}")
        return 0
    run = api.run(newest(api, options.run).run_id)
    print(f"run {options.run}: {run.state}, {api.address('runs', run.run_id)}")
    for task in task_states(run, task_names(api.pipeline_spec(run))):
        print(f"  {task}")
    if run.state not in FINAL:
        _show_waiting(options.context, connection.namespace, run.run_id)
    return int(run.state == "FAILED")


def _show_waiting(context: str, namespace: str, run_id: str) -> None:
    """Print why pods do not run yet: KFP shows a task that no node can take like one at work."""
    try:
        for name, reason in waiting_pods(KubernetesApi(namespace, context=context), run_id):
            print(f"  {name} does not run yet: {reason or 'no reason given'}")
    except KubernetesError as error:
        print(f"pipelines: {error}; why tasks wait is not shown", file=sys.stderr)


def retry(options: argparse.Namespace) -> int:
    """Start the newest run of a name again at what failed, with its own pipeline and settings; follow it with --wait.

    Of a recurring run too, where submit would compile another pipeline and take the preset's sources.

    Raises:
        KfpError: there is no such run, it is under way, or it has succeeded.
    """
    api, name = KfpApi(Connection.from_environment(options.host, options.namespace)), options.run
    run = api.run(newest(api, name).run_id)
    if run.state in ("SUCCEEDED", "SKIPPED"):
        raise KfpError(f"run {name!r} has {run.state}: there is nothing to retry")
    if run.state not in FINAL:
        raise KfpError(
            f"run {name!r} is {run.state}: wait for its end (make status RUN={shlex.quote(name)}), or make cancel it "
            "first"
        )
    api.retry(run.run_id)
    print(f"run {name}: goes on where it failed, {api.address('runs', run.run_id)}")
    if command := _report_command(run, api.pipeline_spec(run)):
        print(f"KFP makes no second report of a run: when it has ended, {command}")
    return follow(api, run.run_id, name) if options.wait else 0


def _report_command(run: Any, pipeline_spec: Mapping[str, Any]) -> str:
    """Return what writes a run's report anew: Argo keeps an exit task that has succeeded, whatever is retried."""
    root, name = str(parameters_of(run).get("root", "")), own_name(run)
    num_iterations = sum(key.startswith("comp-iteration-") for key in pipeline_spec.get("components", ()))
    if not (root and name and num_iterations):
        return ""
    uri = layout.run(root, name)
    return f"dice report --run {uri} --output {layout.report(uri)} --num-iterations {num_iterations}"


def newest(api: KfpApi, name: str) -> Any:
    """Return the newest run of a name, as runs_of has them.

    Raises:
        KfpError: there is none, or the name is empty, which would be a run of anybody.
    """
    runs = runs_of(api, name) if name else []
    if not runs:
        latest = list(dict.fromkeys(run.display_name for run in api.runs()))[:5]
        fault = f"there is none called {name!r}" if name else "RUN= is needed, the name of a run"
        raise KfpError(f"run: {fault}; the latest are: {', '.join(latest) or 'none'}")
    return runs[0]


def runs_of(api: KfpApi, name: str) -> list[Any]:
    """Return the runs of a name, the newest first: KFP's, or the recurring run of that place in S3."""
    return api.runs(name) or _recurring_run(api, name)


def _recurring_run(api: KfpApi, name: str) -> list[Any]:
    """Return the recurring run that keeps its results under a name, if there is one."""
    # Nothing in a list of runs says it: only a name of that form is worth going through all of them.
    if not recurring.is_run_name(name):
        return []
    for found in api.recurring_runs():
        # A part of the run's id ends the name; only what fits is read whole, with its parameters.
        if name.endswith(recurring.run_name("x", found.run_id)[1:]) and own_name(run := api.run(found.run_id)) == name:
            return [run]
    return []


def follow(api: KfpApi, run_id: str, name: str) -> int:
    """Print each change of a task's state until the run ends; return 0 if it succeeded.

    A connection that breaks for a while (a port-forward that is restarted) does not end it.
    """
    shown: dict[int, str] = {}
    names: list[TaskName] | None = None
    try:
        for run in _polls(api, run_id):
            if names is None:
                names = task_names(api.pipeline_spec(run))
            tasks = task_states(run, names)
            num_done = sum(task.state in FINAL for task in tasks)
            for index, task in enumerate(tasks):
                if task.state != _WAITING and shown.get(index) != task.state:
                    shown[index] = task.state
                    print(f"{datetime.now():%H:%M:%S} [{num_done:2d}/{len(tasks)}] {task}", flush=True)
    except KeyboardInterrupt:
        print(f"\nthe run goes on; stop it: make cancel RUN={shlex.quote(name)}", file=sys.stderr)
        return 130
    reason = f": {run.error.message}" if run.error and run.error.message else ""
    print(f"run {name}: {run.state}{reason}")
    if run.state != "SUCCEEDED":
        # KFP's own name of a recurring run has spaces.
        word = shlex.quote(name)
        print(f"why: make logs RUN={word}; make retry RUN={word} continues it", file=sys.stderr)
    return int(run.state != "SUCCEEDED")


def _polls(api: KfpApi, run_id: str) -> Iterator[Any]:
    """Yield the run again and again, at last in its final state."""
    lost_since = 0.0
    while True:
        try:
            run = api.run(run_id)
        except KfpError as error:
            if not lost_since:
                lost_since = time.monotonic()
                print(f"pipelines: {error}; trying again", file=sys.stderr)
            elif time.monotonic() - lost_since > _PATIENCE_SECONDS:
                raise
        else:
            lost_since = 0.0
            yield run
            if run.state in FINAL:
                return
        time.sleep(POLL_SECONDS)


def task_names(pipeline_spec: Mapping[str, Any]) -> list[TaskName]:
    """Return the names of all tasks that are pods, in the order of the graph.

    Args:
        pipeline_spec: as compiled; empty gives no name.
    """
    components, names = pipeline_spec.get("components", {}), []

    def visit(dag: Mapping[str, Any], path: str, conditions: frozenset[str]) -> None:
        for key, task in _in_order(dag["tasks"]):
            component, name = components[task["componentRef"]["name"]], task["taskInfo"]["name"]
            if "dag" in component:
                # The exit handler and conditions are frames around tasks, not a part that a person knows.
                inner = f"{path}{name}: " if name.startswith("iteration") else path
                is_condition = "condition" in task.get("triggerPolicy", {})
                visit(component["dag"], inner, conditions | {key} if is_condition else conditions)
            else:
                names.append(TaskName(key, path + name, conditions))

    if "root" in pipeline_spec:
        visit(pipeline_spec["root"]["dag"], "", frozenset())
    return names


def _in_order(tasks: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return tasks after those they wait for; of the free ones the first by name."""
    left, ordered = dict(sorted(tasks.items())), list[tuple[str, Any]]()
    while left:
        free = next((key for key, task in left.items() if not left.keys() & set(task.get("dependentTasks", ()))), None)
        key = free or next(iter(left))
        ordered.append((key, left.pop(key)))
    return ordered


def task_states(run: Any, names: Sequence[TaskName]) -> list[TaskState]:
    """Return the states of a run's tasks.

    A name that several iterations share is told apart by time: iterations follow one another. KFP reports nothing of
    the tasks inside a condition that did not hold, only the condition.

    Args:
        run: with details.
        names: of task_names; empty shows what KFP reports, under its own names.
    """
    details = sorted(
        (run.run_details.task_details or ()) if run.run_details else (), key=lambda detail: _time(detail.create_time)
    )
    if not names:
        own = [detail for detail in details if not _is_machinery(detail.display_name or "")]
        return [_state(detail.display_name or "", detail) for detail in own]
    found: dict[str, list[Any]] = {}
    for detail in details:
        found.setdefault(detail.display_name or "", []).append(detail)
    skipped = {detail.display_name for detail in details if detail.state == "SKIPPED"}
    return [
        _state(name.label, found[name.key].pop(0))
        if found.get(name.key)
        else TaskState(name.label, "SKIPPED" if name.conditions & skipped else _WAITING)
        for name in names
    ]


def _is_machinery(name: str) -> bool:
    return (
        name == "root"
        or name.endswith("-driver")
        or name.startswith(("executor", "dice-", "exit-handler", "condition-"))
    )


def _state(label: str, detail: Any) -> TaskState:
    start = detail.start_time or detail.create_time
    seconds = (_time(detail.end_time) or datetime.now(UTC).timestamp()) - _time(start) if start else 0.0
    error = detail.error.message if detail.error and detail.state == "FAILED" else ""
    return TaskState(label, detail.state or _WAITING, max(0.0, seconds), " ".join((error or "").split()))


def _time(moment: datetime | None) -> float:
    """Return seconds since 1970; KFP writes the first second of 1970 where it knows no time."""
    return max(0.0, moment.timestamp()) if moment else 0.0

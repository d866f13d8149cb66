"""`make status`, `make cancel`, and how a run is followed: its tasks, what they are called in our words, their states.

Kubeflow Pipelines reports a flat list of all it started: drivers, executors, and graphs among the tasks. The compiled
pipeline says which of them are tasks. Logs are logs.py's business.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dice_core import recurring
from pipelines.cluster_api import ClusterApi, ClusterError
from pipelines.durations import show_duration
from pipelines.kfp_api import Connection, KfpApi, KfpError
from pipelines.pods import waiting_pods
from pipelines.training_jobs import own_name, stop_training

POLL_SECONDS = 10.0
_PATIENCE_SECONDS = 600.0
_AS_BEFORE = "with the same PRESET, REGISTRY and SET"
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
    for task in task_states(run, task_labels(api.pipeline_spec(run))):
        print(f"  {task}")
    if run.state not in FINAL:
        _show_waiting(options.context, connection.namespace, run.run_id)
    return int(run.state == "FAILED")


def _show_waiting(context: str, namespace: str, run_id: str) -> None:
    """Print why pods do not run yet: KFP shows a task that no node can take like one at work."""
    try:
        for name, reason in waiting_pods(ClusterApi(context, namespace), run_id):
            print(f"  {name} does not run yet: {reason or 'no reason given'}")
    except ClusterError as error:
        print(f"pipelines: {error}; why tasks wait is not shown", file=sys.stderr)


def cancel(options: argparse.Namespace) -> int:
    """Stop the newest run of a name and its training; what it has finished stays, and the same name continues it."""
    connection = Connection.from_environment(options.host, options.namespace)
    api = KfpApi(connection)
    run = newest(api, options.run)
    if run.state in FINAL:
        print(f"run {options.run}: is {run.state} already")
    else:
        api.terminate(run.run_id)
        next_step = (
            "its schedule starts the next"
            if run.recurring_run_id
            else f"make submit RUN={options.run} {_AS_BEFORE} continues it"
        )
        print(f"run {options.run}: is being stopped; {next_step}")
    if run.state != "SUCCEEDED":
        # Of a run that has ended too: one that was terminated in the UI may have left its job.
        stop_training(options.context, connection.namespace, api.run(run.run_id))
    return 0


def newest(api: KfpApi, name: str) -> Any:
    """Return the newest run of a name: KFP's, or for a recurring run that of its place in S3.

    Raises:
        KfpError: there is none, or the name is empty, which would be a run of anybody.
    """
    runs = (api.runs(name) or _recurring_run(api, name)) if name else []
    if not runs:
        latest = list(dict.fromkeys(run.display_name for run in api.runs()))[:5]
        fault = f"there is none called {name!r}" if name else "RUN= is needed, the name of a run"
        raise KfpError(f"run: {fault}; the latest are: {', '.join(latest) or 'none'}")
    return runs[0]


def _recurring_run(api: KfpApi, name: str) -> list[Any]:
    """Return the recurring run that keeps its results under a name, if there is one."""
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
    labels: list[tuple[str, str]] | None = None
    try:
        for run in _polls(api, run_id):
            if labels is None:
                labels = task_labels(api.pipeline_spec(run))
            tasks = task_states(run, labels)
            num_done = sum(task.state in FINAL for task in tasks)
            for index, task in enumerate(tasks):
                if task.state != _WAITING and shown.get(index) != task.state:
                    shown[index] = task.state
                    print(f"{datetime.now():%H:%M:%S} [{num_done:2d}/{len(tasks)}] {task}", flush=True)
    except KeyboardInterrupt:
        print(f"\nthe run goes on; stop it: make cancel RUN={name}", file=sys.stderr)
        return 130
    reason = f": {run.error.message}" if run.error and run.error.message else ""
    print(f"run {name}: {run.state}{reason}")
    if run.state != "SUCCEEDED":
        print(f"why: make logs RUN={name}; make submit RUN={name} {_AS_BEFORE} continues it", file=sys.stderr)
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


def task_labels(pipeline_spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (KFP's name of a task, our name of it) for all tasks that are pods, in the order of the graph.

    Args:
        pipeline_spec: as compiled; empty gives no label.
    """
    components, labels = pipeline_spec.get("components", {}), []

    def visit(dag: Mapping[str, Any], path: str) -> None:
        for key, task in _in_order(dag["tasks"]):
            component, name = components[task["componentRef"]["name"]], task["taskInfo"]["name"]
            if "dag" in component:
                # The exit handler is a frame around the run, not a part that a person knows.
                visit(component["dag"], f"{path}{name}: " if name.startswith("iteration") else path)
            else:
                labels.append((key, path + name))

    if "root" in pipeline_spec:
        visit(pipeline_spec["root"]["dag"], "")
    return labels


def _in_order(tasks: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return tasks after those they wait for; of the free ones the first by name."""
    left, ordered = dict(sorted(tasks.items())), list[tuple[str, Any]]()
    while left:
        free = next((key for key, task in left.items() if not left.keys() & set(task.get("dependentTasks", ()))), None)
        key = free or next(iter(left))
        ordered.append((key, left.pop(key)))
    return ordered


def task_states(run: Any, labels: Sequence[tuple[str, str]]) -> list[TaskState]:
    """Return the states of a run's tasks.

    A name that several iterations share is told apart by time: iterations follow one another.

    Args:
        run: with details.
        labels: of task_labels; empty shows what KFP reports, under its own names.
    """
    details = sorted(
        (run.run_details.task_details or ()) if run.run_details else (), key=lambda detail: _time(detail.create_time)
    )
    if not labels:
        own = [detail for detail in details if not _is_machinery(detail.display_name or "")]
        return [_state(detail.display_name or "", detail) for detail in own]
    found: dict[str, list[Any]] = {}
    for detail in details:
        found.setdefault(detail.display_name or "", []).append(detail)
    return [
        _state(label, found[name].pop(0)) if found.get(name) else TaskState(label, _WAITING) for name, label in labels
    ]


def _is_machinery(name: str) -> bool:
    return name == "root" or name.endswith("-driver") or name.startswith(("executor", "dice-", "exit-handler"))


def _state(label: str, detail: Any) -> TaskState:
    start = detail.start_time or detail.create_time
    seconds = (_time(detail.end_time) or datetime.now(UTC).timestamp()) - _time(start) if start else 0.0
    error = detail.error.message if detail.error and detail.state == "FAILED" else ""
    return TaskState(label, detail.state or _WAITING, max(0.0, seconds), " ".join((error or "").split()))


def _time(moment: datetime | None) -> float:
    """Return seconds since 1970; KFP writes the first second of 1970 where it knows no time."""
    return max(0.0, moment.timestamp()) if moment else 0.0

"""The states of a run's tasks, each from the source that knows it; `?` where none does. Pure: no calls, no clock.

Two sources, the surer first. The workflow's nodes are the truth while the workflow is there. KFP's answer is a copy
that ends where Argo begins to compress the status (from 1 MiB on): what it says is final is true, what it says is
under way may be over. What the results tell beside is stage_states.py's.

KFP's answer names a task by its key in its own graph alone. It names the children of each by Argo's ids, which are
FNV-1a hashes of the nodes' names: these tell tasks of one key apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dice_core.settings.durations import show_duration
from pipelines.cluster.workflow import Node, Workflow
from pipelines.kfp.task_graph import EXIT, GraphTask, driver_of, key_of

UNKNOWN, WAITING, NOT_RUN = "?", "waiting", "not run"
OK, SKIPPED, FAILED, STOPPED = "ok", "skipped", "FAILED", "stopped"
STARTING, PENDING, RUNNING, RETRYING = "starting", "pending", "running", "retrying"
ENDED = (OK, SKIPPED, FAILED, STOPPED, NOT_RUN)
_UNDER_WAY = ("Running", "Pending", "")
_FAILURES = ("Failed", "Error", "FAILED")


@dataclass(frozen=True)
class TaskState:
    """A task of a run: what people call it, its state, how long it has been at it, and what there is to say."""

    label: str
    state: str
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        """Return one line."""
        spent = f"  {show_duration(self.seconds)}" if self.seconds >= 1 else ""
        return f"{self.label:<28} {self.state}{spent}" + (f"  {self.note}" if self.note else "")


@dataclass(frozen=True)
class RunFacts:
    """What Kubeflow Pipelines says of a run as a whole."""

    state: str
    is_final: bool
    stopped_at: float = 0.0
    """When a person stopped it, in seconds since 1970; 0: nobody did, since its last start."""

    @property
    def label(self) -> str:
        """What to call its state: KFP calls a run that a person has stopped FAILED."""
        return STOPPED if self.stopped_at and self.is_final and self.state != "SUCCEEDED" else self.state


def run_facts(run: Any) -> RunFacts:
    """Return what KFP says of a run as a whole."""
    state = str(run.state or "")
    history = [(str(entry.state or ""), seconds(entry.update_time)) for entry in run.state_history or ()]
    since_start = history[_last(history, "RUNNING") + 1 :]
    stopped = [moment for name, moment in since_start if name in ("CANCELING", "CANCELED")]
    if not stopped and state in ("CANCELING", "CANCELED"):
        stopped = [seconds(run.finished_at) or 1.0]
    return RunFacts(state, state in ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"), min(stopped, default=0.0))


def _last(history: Sequence[tuple[str, float]], state: str) -> int:
    return max((index for index, (name, _) in enumerate(history) if name == state), default=-1)


def workflow_states(tasks: Sequence[GraphTask], workflow: Workflow, facts: RunFacts, now: float) -> list[TaskState]:
    """Return the states of tasks as the nodes of a workflow have them.

    Args:
        tasks: of the compiled pipeline; none: those that the nodes tell of.
        workflow: with its nodes.
        facts: of the run.
        now: seconds since 1970.
    """
    nodes: dict[str, list[Node]] = {}
    for node in workflow.nodes or ():
        nodes.setdefault(node.path, []).append(node)
    found = tasks or tasks_of_paths(path.removesuffix(".executor") for path in nodes if path.endswith(".executor"))
    return [_node_state(task, nodes, workflow, facts, now) for task in found]


def _node_state(
    task: GraphTask, nodes: Mapping[str, list[Node]], workflow: Workflow, facts: RunFacts, now: float
) -> TaskState:
    node = _whole(nodes.get(task.path, ()))
    if node is None or node.phase == "Omitted":
        return TaskState(task.label, _state_without_node(task, nodes, workflow, is_omitted=node is not None))
    spent = max(0.0, (moment(node.finished) or now) - moment(node.started)) if node.started else 0.0
    attempts = sorted(nodes.get(f"{task.path}.executor", ()), key=lambda attempt: attempt.attempt or 0)
    if node.phase not in _UNDER_WAY:
        state = {"Succeeded": OK, "Skipped": SKIPPED}.get(node.phase, FAILED)
        if state == FAILED and facts.stopped_at and (moment(node.finished) or now) >= facts.stopped_at:
            state = STOPPED
        return TaskState(task.label, state, spent, _last_message(attempts) if state == FAILED else "")
    state, note = _attempt_state(attempts, now)
    return TaskState(task.label, state, spent, note)


def _whole(nodes: Iterable[Node]) -> Node | None:
    """Return the node of a task as a whole, not that of one attempt."""
    found = list(nodes)
    return next((node for node in found if node.attempt is None), found[0] if found else None)


def _state_without_node(
    task: GraphTask, nodes: Mapping[str, list[Node]], workflow: Workflow, *, is_omitted: bool
) -> str:
    if any(_is_skipped(nodes, condition) for condition in task.conditions):
        return SKIPPED
    driver = _whole(nodes.get(driver_of(task.path), ()))
    if driver and driver.phase in _FAILURES:
        return FAILED
    if is_omitted or workflow.is_final:
        return NOT_RUN
    return STARTING if driver else WAITING


def _is_skipped(nodes: Mapping[str, list[Node]], path: str) -> bool:
    node = _whole(nodes.get(path, ()))
    return node is not None and node.phase == "Skipped"


def _attempt_state(attempts: Sequence[Node], now: float) -> tuple[str, str]:
    """Return the state of a task that has not ended, and which attempt it is at."""
    pods = [attempt for attempt in attempts if attempt.attempt is not None]
    whole = _whole(attempts)
    most = int(whole.inputs.get("retry-max-count") or 0) + 1 if whole else 1
    if not pods:
        return STARTING, ""
    if pods[-1].phase in _FAILURES and len(pods) < most and whole:
        return RETRYING, f"attempt {len(pods) + 1} of {most}{_when(whole, pods, now)}"
    note = f"attempt {len(pods)} of {most}" if len(pods) > 1 else ""
    return (PENDING if pods[-1].phase == "Pending" else RUNNING), note


def _when(whole: Node, pods: Sequence[Node], now: float) -> str:
    """Return when Argo starts the next attempt: each pause is `factor` times the one before."""
    pause = whole.inputs.get("retry-backoff-duration", "").removesuffix("s")
    if not pause.isdigit() or not pods[-1].finished:
        return ""
    factor = float(whole.inputs.get("retry-backoff-factor") or 1)
    left = moment(pods[-1].finished) + int(pause) * factor ** (len(pods) - 1) - now
    return f", the next in {show_duration(left)}" if left >= 1 else ", which starts now"


def _last_message(attempts: Sequence[Node]) -> str:
    pods = [attempt for attempt in attempts if attempt.attempt is not None]
    after = f"after {len(pods)} attempts" if len(pods) > 1 else ""
    return ": ".join(filter(None, [after, " ".join(pods[-1].message.split()) if pods else ""]))


def kfp_states(tasks: Sequence[GraphTask], run: Any, facts: RunFacts, now: float) -> list[TaskState]:
    """Return the states of tasks as far as KFP's own answer tells them.

    Args:
        tasks: of the compiled pipeline; none: those that the answer tells of.
        run: with its details.
        facts: of the run.
        now: seconds since 1970.
    """
    details = list((run.run_details.task_details or ()) if run.run_details else ())
    entries = entries_by_path(details)
    _add_unique_keys(entries, details, tasks)
    roots = [detail.state for path, detail in entries.items() if path in ("", "root")]
    is_whole = facts.is_final and bool(roots) and all(state in ("SUCCEEDED", "FAILED") for state in roots)
    found = tasks or tasks_of_paths(path.removesuffix(".executor") for path in entries if path.endswith(".executor"))
    return [_entry_state(task, entries, facts, is_whole, now) for task in found]


def _entry_state(task: GraphTask, entries: Mapping[str, Any], facts: RunFacts, is_whole: bool, now: float) -> TaskState:
    entry = entries.get(task.path)
    state = str(entry.state or "") if entry else ""
    spent = (seconds(entry.end_time) or now) - seconds(entry.start_time) if entry and entry.start_time else 0.0
    if state == "SUCCEEDED":
        return TaskState(task.label, OK, spent)
    if any(entries[path].state == "SKIPPED" for path in task.conditions if path in entries) or state == "SKIPPED":
        return TaskState(task.label, SKIPPED)
    if entry and state == "FAILED" and is_whole:
        is_stopped = facts.stopped_at and seconds(entry.end_time) >= facts.stopped_at
        message = entry.error.message if entry.error else ""
        return TaskState(task.label, STOPPED if is_stopped else FAILED, spent, " ".join((message or "").split()))
    if is_whole:
        return TaskState(task.label, NOT_RUN)
    if facts.state == "SUCCEEDED" and _has_run_to_its_end(task, entries):
        return TaskState(task.label, OK)
    return TaskState(task.label, UNKNOWN, note=_last_word(entry, state))


def _has_run_to_its_end(task: GraphTask, entries: Mapping[str, Any]) -> bool:
    """Return whether a task of a run that has succeeded must have: its branch was taken. An exit task may fail."""
    return EXIT not in task.path and all(path in entries for path in task.conditions)


def _last_word(entry: Any, state: str) -> str:
    if not state:
        return ""
    history = [update.update_time for update in entry.state_history or () if update.update_time]
    since = f" since {max(history):%H:%M} UTC" if history else ""
    return f"KFP's last word: {state}{since}"


def entries_by_path(details: Sequence[Any]) -> dict[str, Any]:
    """Return the entries of KFP's answer by the paths of their nodes, as the ids of their children tell.

    The workflow itself has the path "". An entry without children (it never ran) is left out: nothing places it.
    """
    children = [
        (detail, str(detail.display_name or ""), {str(c.pod_name or "") for c in detail.child_tasks or ()})
        for detail in details
    ]
    found: dict[str, Any] = {}
    workflows = {pod.rpartition("-")[0] for _, _, pods in children for pod in pods}
    names = [(name, "", name) for name in workflows]
    while names:
        raw, path, wanted = names.pop()
        for detail, name, pods in children:
            if name != wanted or path in found:
                continue
            taken = [f"{raw}({n})" for n in range(len(pods) + 1) if _node_id(raw, f"{raw}({n})") in pods]
            if not taken:
                continue
            found[path] = detail
            names += [
                (f"{attempt}.{below}", f"{path}.{below}".removeprefix("."), below)
                for attempt in taken
                for below in {name for _, name, _ in children if not name.endswith(")")}
            ]
    return found


def _node_id(raw: str, name: str) -> str:
    workflow = raw.partition("(")[0].partition(".")[0]
    return f"{workflow}-{_fnv1a(name)}"


def _fnv1a(text: str) -> int:
    """Return the 32-bit FNV-1a hash that Argo makes a node's id of."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def _add_unique_keys(entries: dict[str, Any], details: Sequence[Any], tasks: Sequence[GraphTask]) -> None:
    """Place entries that no child places by their key, where one task and one entry have it."""
    paths = [task.path for task in tasks] + [path for task in tasks for path in task.conditions]
    for path in dict.fromkeys(paths):
        key = key_of(path)
        named = [detail for detail in details if detail.display_name == key]
        if path not in entries and len(named) == 1 and sum(key_of(other) == key for other in set(paths)) == 1:
            entries[path] = named[0]


def tasks_of_paths(paths: Iterable[str]) -> list[GraphTask]:
    """Return tasks under their own keys, for a run whose compiled pipeline is not known."""
    found = []
    for path in paths:
        around = [part for part in path.split(".")[:-1] if part.startswith("iteration-")]
        frame = f"{around[-1].replace('-', ' ')}: " if around and not key_of(path).startswith(around[-1]) else ""
        found.append(GraphTask(path, frame + key_of(path)))
    return sorted(found, key=lambda task: task.label)


def moment(text: str) -> float:
    """Return seconds since 1970 of a time as Kubernetes writes it; 0 of none."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def seconds(time: datetime | None) -> float:
    """Return seconds since 1970; KFP writes the first second of 1970 where it knows no time."""
    if time is None:
        return 0.0
    return max(0.0, (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())

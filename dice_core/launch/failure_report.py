"""What a person needs to know about a training job in trouble: why pods do not start, and why it failed. Pure.

Jobs, pods and events are the plain dicts of the Kubernetes API.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dice_core.launch.job_kind import true_conditions
from dice_core.training.job import ERROR, FINAL_ERROR

# The last line of a traceback, which torch prefixes with the rank.
_EXCEPTION = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")
# torchrun's report of a process that could not speak for itself any more.
_SIGNAL = re.compile(r"\s*traceback : (Signal \d+ .*)")
# What torchrun --tee puts in front of a process's line.
_PROCESS = re.compile(r"^\[[a-z]+\d+\]:")
_OF_TORCHRUN = re.compile(r"\b(?:ChildFailedError|SignalException)\b")
_NUM_EVENTS = 5
_NUM_MESSAGE_LINES = 12
_SIGNALS = {137: "killed", 139: "segmentation fault", 143: "told to stop"}


class Line(NamedTuple):
    """A line of a log."""

    time: tuple[str, str]
    """On its node's clock: date and time, nanoseconds. Comparable."""
    text: str


LastLines = Mapping[str, Sequence[Line]]
"""Of each process by its name: "rank 3", or "node 1" for what torchrun itself says there."""
Pods = Mapping[str, Mapping[str, Any]]
Events = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of a pod or the job, by its name."""


def is_late(job: Mapping[str, Any]) -> bool:
    """Return whether whoever controls a job has ended it for the time it took."""
    return any(found["type"] == "Failed" and _is_of_deadline(found) for found in true_conditions(job))


def waiting_reasons(pods: Pods, events: Events, num_expected: int, operator: str) -> list[str]:
    """Return why pods have not started, one line for each; empty: all run or have run.

    Args:
        pods: of the job, by name.
        events: of these pods and of the job, oldest first.
        num_expected: how many pods the job has.
        operator: who should create them, in words.
    """
    reasons = [
        f"{name}: {why_waiting(pod) or _newest(events.get(name, ())) or 'Pending'}" for name, pod in _pending(pods)
    ]
    if len(pods) < num_expected:
        of_job = [event for name, about in events.items() if name not in pods for event in about]
        why = _newest(of_job) or ("" if pods else f"is {operator} running?")
        reasons.append(f"{num_expected - len(pods)} of {num_expected} pods not created" + (f": {why}" if why else ""))
    return reasons


def stuck_reasons(pods: Pods) -> list[str]:
    """Return what pods' own states say of why they do not start: no node, no image, no secret. Often for good."""
    return [f"{name}: {'; '.join(stuck)}" for name, pod in _pending(pods) if (stuck := _stuck(pod))]


def why_waiting(pod: Mapping[str, Any]) -> str:
    """Return what a pod's own state says of why it does not run; empty where it only starts.

    An init container that cannot start keeps the others from saying anything else than PodInitializing.
    """
    return "; ".join(_stuck(pod))


def queue_reasons(
    workloads: Sequence[Mapping[str, Any]] | None, events: Sequence[Mapping[str, Any]], kind: str
) -> list[str]:
    """Return why Kueue has not admitted a job.

    Args:
        workloads: Kueue's own objects for the job; None: they cannot be read.
        events: of the job, oldest first.
        kind: of the job, such as PyTorchJob.
    """
    states = [found for workload in workloads or () for found in (workload.get("status") or {}).get("conditions") or []]
    # Such as "LocalQueue x doesn't exist" and "insufficient unused quota".
    refused = [found for found in states if found["type"] == "QuotaReserved" and found["status"] == "False"]
    if refused:
        return [_reason_and_message(found) for found in refused]
    hint = "" if workloads else f"it has no Workload: does Kueue manage {kind}s here?"
    if workloads is None:
        hint = "its Workload, which says why, cannot be read"
    return [text for text in (_newest(events), hint) if text]


def has_failed(pods: Pods) -> bool:
    """Return whether a container has ended with an error, also if it was started again."""
    return bool(_first_failure(pods)[0])


def restarts(pod: Mapping[str, Any]) -> int:
    """Return how often a pod's containers were restarted."""
    return sum(status.get("restartCount", 0) for status in _statuses(pod))


def failure_report(
    job: Mapping[str, Any],
    pods: Pods,
    events: Events,
    last_lines: LastLines,
    cause: str = "",
    gone: Collection[str] = (),
) -> str:
    """Return why a job failed. First line: the cause and the exit code; then conditions, pods, events, last lines.

    Args:
        job: as it was last seen.
        pods: every pod of it, as last seen; it may be gone by now.
        events: of these pods and the job, oldest first.
        last_lines: of each process, by its name; without any, what the containers' states have kept of their logs.
        cause: where it is known; empty: what these tell.
        gone: names of pods that are not there any more.
    """
    metadata = job["metadata"]
    last_lines = last_lines or _termination_messages(pods)
    name, exit_code = _first_failure(pods)
    where = f", exit code {exit_code}{_meaning(exit_code)} in {name}" if name else ""
    cause = cause or _cause(job, pods, last_lines, gone)
    lines = [f"training failed{where}: {cause} (job {metadata.get('namespace', '')}/{metadata['name']})"]
    for condition in true_conditions(job):
        if condition["type"] == "Created":
            continue
        said = f"{condition.get('reason', '')}: {condition.get('message', '')}"
        lines.append(f"condition {condition['type']}: {said}")
    lines += [f"pod {name}: {_pod_state(pod)}" for name, pod in sorted(pods.items())]
    for about, of_object in sorted(events.items()):
        lines += [f"event of {about}: {_event(event)}" for event in _telling(of_object)]
    lines += [f"[{process}] {line.text}" for process, said in _in_order(last_lines) for line in said]
    return "\n".join(lines)


def find_cause(lines: Iterable[str]) -> str:
    """Return what tells the cause best: an error written for a person, else the first exception, else ""."""
    lines = list(lines)
    if told := _told(lines, FINAL_ERROR) or _told(lines, ERROR):
        return told
    # torchrun's own exceptions only say that a process failed, or that it was told to stop.
    exceptions = [match[1] for line in lines if (match := _EXCEPTION.match(line)) and not _OF_TORCHRUN.search(line)]
    signals = [match[1] for line in lines if (match := _SIGNAL.match(line))]
    return next(iter([*exceptions, *signals]), "")


def _told(lines: Iterable[str], prefix: str) -> str:
    return next((line.removeprefix(prefix) for line in lines if line.startswith(prefix)), "")


def _cause(job: Mapping[str, Any], pods: Pods, last_lines: LastLines, gone: Collection[str]) -> str:
    failed = [found for found in true_conditions(job) if found["type"] == "Failed"]
    said = [str(found.get("message") or found.get("reason") or "") for found in failed]
    # Whoever controls the job then ends the processes, whose last words are of that end.
    if late := [text for text, found in zip(said, failed, strict=True) if _is_of_deadline(found)]:
        return late[0]
    # By time: what fails first makes the others fail.
    lines = [line.text for line in sorted(line for lines in last_lines.values() for line in lines)]
    # What the cluster did to a pod makes its processes, and their peers, say a lot that is no cause.
    if cause := _told(lines, FINAL_ERROR) or _act_of_the_cluster(pods) or find_cause(lines):
        return cause
    for _, ended in _endings(pods):
        if ended.get("exitCode") and ended.get("reason", "Error") != "Error":
            return str(ended["reason"])
    if gone and not has_failed(pods):
        return f"{', '.join(sorted(gone))} went while it ran: deleted, preempted, or with its node"
    return next(iter(filter(None, said)), "no reason was given")


def _is_of_deadline(condition: Mapping[str, Any]) -> bool:
    return "deadline" in f"{condition.get('reason')} {condition.get('message')}".lower()


def _act_of_the_cluster(pods: Pods) -> str:
    """Return what ended a pod from outside: an eviction, a lost node, its memory limit. No log says it."""
    for name, pod in sorted(pods.items()):
        if pod["status"].get("phase") == "Failed" and pod["status"].get("reason"):
            return _reason_and_message({**pod["status"], "reason": f"{name} {pod['status']['reason']}"})
    ended = [(status.get("state") or {}).get("terminated") or {} for pod in pods.values() for status in _statuses(pod)]
    return next((str(end["reason"]) for end in ended if end.get("reason") not in (None, "Error", "Completed")), "")


def _first_failure(pods: Pods) -> tuple[str, int]:
    failures = [(ended.get("finishedAt") or "", name, ended["exitCode"]) for name, ended in _endings(pods)]
    failed = sorted((at, name, code) for at, name, code in failures if code)
    return failed[0][1:] if failed else ("", 0)


def _endings(pods: Pods) -> list[tuple[str, Mapping[str, Any]]]:
    """Return how containers ended, the last time and the time before."""
    return [
        (name, status[key]["terminated"])
        for name, pod in sorted(pods.items())
        for status in _statuses(pod)
        for key in ("lastState", "state")
        if (status.get(key) or {}).get("terminated")
    ]


def _termination_messages(pods: Pods) -> LastLines:
    """Return the ends of logs that the kubelet keeps of failed containers (FallbackToLogsOnError)."""
    said = [(name, (ended.get("message") or "").splitlines()) for name, ended in _endings(pods)]
    return {
        name: [Line(("", f"{i:09}"), _PROCESS.sub("", text)) for i, text in enumerate(texts[-_NUM_MESSAGE_LINES:])]
        for name, texts in said
        if texts
    }


def _meaning(exit_code: int) -> str:
    return f" ({_SIGNALS[exit_code]})" if exit_code in _SIGNALS else ""


def _pod_state(pod: Mapping[str, Any]) -> str:
    status = pod["status"]
    node = pod["spec"].get("nodeName")
    parts = [status.get("phase", "Pending") + (f" on {node}" if node else "")]
    if status.get("reason"):
        parts.append(f"{status['reason']}: {status.get('message', '')}".rstrip(": "))
    for container in _statuses(pod):
        ended = (container.get("state") or {}).get("terminated") or (container.get("lastState") or {}).get("terminated")
        if ended:
            parts.append(f"exit code {ended['exitCode']}" + (f" ({ended['reason']})" if ended.get("reason") else ""))
    parts += _stuck(pod)
    if restarts(pod):
        parts.append(f"{restarts(pod)} restarts")
    return ", ".join(parts)


def _pending(pods: Pods) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, pod) for name, pod in sorted(pods.items()) if pod["status"].get("phase", "Pending") == "Pending"]


def _stuck(pod: Mapping[str, Any]) -> list[str]:
    status = pod["status"]
    containers = [*(status.get("initContainerStatuses") or []), *_statuses(pod)]
    waiting = [state for container in containers if (state := (container.get("state") or {}).get("waiting"))]
    # These two are how every pod starts.
    stuck = [state for state in waiting if state.get("reason") not in ("ContainerCreating", "PodInitializing", None)]
    stuck += [
        condition
        for condition in status.get("conditions") or []
        if condition["status"] == "False" and condition["type"] == "PodScheduled"
    ]
    return list(dict.fromkeys(_reason_and_message(state) for state in stuck))


def _newest(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the newest warning, or else the newest event."""
    telling = _telling(events)
    return _event(telling[-1]) if telling else ""


def _telling(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    warnings = [event for event in events if event.get("type") == "Warning"]
    return list(warnings or events)[-_NUM_EVENTS:]


def _event(event: Mapping[str, Any]) -> str:
    count = (event.get("series") or {}).get("count") or event.get("count") or 1
    times = f" ({count} times)" if count > 1 else ""
    return _reason_and_message({"reason": event.get("reason"), "message": event.get("message")}) + times


def _reason_and_message(state: Mapping[str, Any]) -> str:
    text = f"{state.get('reason') or ''}: {' '.join((state.get('message') or '').split())}"
    return text.strip(": ")


def _in_order(last_lines: LastLines) -> list[tuple[str, Sequence[Line]]]:
    """Return processes by rank, and after them nodes: torchrun tells less of a failure than the process that failed.

    Where a process has said why, torchrun is left out.
    """

    def place(name: str) -> tuple[bool, int, str]:
        kind, _, number = name.partition(" ")
        return kind != "rank", int(number or 0), name

    in_order = sorted(last_lines.items(), key=lambda item: place(item[0]))
    of_processes = [(name, lines) for name, lines in in_order if name.startswith("rank")]
    is_told = bool(find_cause(line.text for _, lines in of_processes for line in lines))
    return of_processes if is_told else in_order


def _statuses(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return pod["status"].get("containerStatuses") or []

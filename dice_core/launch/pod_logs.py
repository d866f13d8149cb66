"""The logs of a job's pods as one stream, each line with the rank of the process that wrote it.

Each look reads what is new since the last one: lines that were shown are not shown twice, and a container that was
started again has its last words read first. What a process printed last is kept, for the report of a failure: pods may
be gone by then.
"""

import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from dice_core.launch.failure_report import LastLines, Line, restarts
from dice_core.launch.job_kind import JobKind
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.progress import heard, log
from dice_core.training.job import FINAL_ERROR

NUM_LAST_LINES = 12
# torchrun --tee puts the role and the local rank in front.
_LOCAL_RANK = re.compile(r"\[[a-z]+(\d+)\]:(.*)")
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?\S*")
_FINISHED = ("Succeeded", "Failed")
_BAD_REQUEST, _FORBIDDEN = 400, 403


class PodLogs:
    """The logs of all pods of a job."""

    def __init__(self, api: KubernetesApi, kind: JobKind, processes_per_node: int) -> None:
        """Take the connection, and what turns local ranks into ranks."""
        self._api, self._kind, self._processes_per_node = api, kind, processes_per_node
        self._logs: dict[str, _PodLog] = {}

    def read(self, pods: Iterable[Mapping[str, Any]]) -> None:
        """Show what is new in the logs of pods that have started."""
        for pod in pods:
            started = any("waiting" not in (status.get("state") or {}) for status in _statuses(pod))
            if started or pod["status"].get("phase") in ("Running", *_FINISHED):
                known = _PodLog(self._api, self._kind, pod, self._processes_per_node)
                self._logs.setdefault(pod["metadata"]["uid"], known).read(pod)

    @property
    def final_error(self) -> str:
        """What a process has said would fail again; empty: none has."""
        return next((each.final_error for each in self._logs.values() if each.final_error), "")

    def last_lines(self) -> LastLines:
        """Return the last lines of each process."""
        merged: dict[str, list[Line]] = {}
        for pod_log in self._logs.values():
            for name, kept in pod_log.last_lines.items():
                # Pods that took each other's place share a name: the later comes later.
                merged[name] = [*merged.get(name, []), *kept][-NUM_LAST_LINES:]
        return merged


class _PodLog:
    """The log of one pod, through restarts of its container."""

    def __init__(self, api: KubernetesApi, kind: JobKind, pod: Mapping[str, Any], processes_per_node: int) -> None:
        self._api, self._name, self._container = api, pod["metadata"]["name"], kind.container
        self._node_rank, self._processes_per_node = kind.node_rank(pod), processes_per_node
        self._second = ""
        """Of the newest line shown, on the node's clock: the next look asks for what was written from then on."""
        self._shown: Counter[str] = Counter()
        """The lines shown of that second, which the next answer has again."""
        self._num_restarts, self._is_unread = 0, True
        """Of the container that runs now: nothing of it has been shown."""
        self._is_over = False
        self._fault = ""
        self.last_lines: dict[str, deque[Line]] = {}
        self.final_error = ""

    def read(self, pod: Mapping[str, Any]) -> None:
        """Show the lines that have not been shown."""
        if self._is_over:
            return
        if restarts(pod) > self._num_restarts:
            # One that came and went between two looks is the last one now, and its log is another.
            self._is_unread |= restarts(pod) > self._num_restarts + 1 or _is_in(pod, "waiting")
            last_words = self._ask(previous="true")
            if last_words is None:
                return
            self._show_new(last_words, has_ended=True)
            self._num_restarts, self._is_unread = restarts(pod), True
        answer = self._ask()
        if answer is not None:
            if not self._is_unread and self._begins_elsewhere(answer):
                self._show_last_words()
            self._show_new(answer, has_ended=not _is_in(pod, "running"))
            # Ended before this look, so that nothing can come after it.
            self._is_over = pod["status"].get("phase") in _FINISHED

    def _begins_elsewhere(self, answer: str) -> bool:
        """Return whether an answer has lines, and none of those shown: it is of another file or container."""
        lines = answer.splitlines()
        return bool(lines) and not any(self._shown[line] for line in lines)

    def _show_last_words(self) -> None:
        """Show the rest of the container whose lines were shown, if it has made room since the pod was looked at."""
        last_words = self._ask(previous="true")
        if last_words and not self._begins_elsewhere(last_words):
            self._show_new(last_words, has_ended=True)
            self._num_restarts, self._is_unread = self._num_restarts + 1, True

    def _ask(self, **which: str) -> str | None:
        """Return the log since the newest line shown; None: it cannot be read now."""
        since = {"sinceTime": f"{self._second}Z"} if self._second else {}
        path = self._api.path("pods", f"{self._name}/log")
        try:
            return self._api.text(path, container=self._container, timestamps="true", **since, **which)
        except KubernetesError as error:
            if error.status == _BAD_REQUEST:
                # A container that waits to start, or is thrown away already.
                return ""
            if error.status == _FORBIDDEN:
                self._is_over = True
                log(f"train: log of {self._name}: {error.detail}; it is not shown")
            elif error.detail != self._fault:
                self._fault = error.detail
                log(f"train: log of {self._name} cannot be read now: {error.detail}")
            return None

    def _show_new(self, answer: str, *, has_ended: bool) -> None:
        """Show what an answer has beyond the lines shown.

        Args:
            answer: the log since the newest line shown.
            has_ended: nothing is added to it any more. Else a line without its end is still being written.
        """
        *lines, rest = answer.split("\n")
        lines += [rest] if rest and has_ended else []
        known, new = self._shown.copy(), []
        for line in lines:
            if known[line]:
                known[line] -= 1
            else:
                new.append(line)
        if lines and len(new) == len(lines) and not self._is_unread:
            # The API has the newest file only.
            log(f"train: log of {self._name}: its node began a new file; lines after {self._second} may be missing")
        self._is_unread &= not lines
        for line in new:
            self._show(line)
        self._second = max([self._second, *(_second(line) for line in new)])
        # A message of the kubelet itself has no time, and is in each answer.
        self._shown += Counter(new)
        self._shown = Counter({line: n for line, n in self._shown.items() if _second(line) in ("", self._second)})

    def _show(self, line: str) -> None:
        stamp, said = _split(line)
        name, text, match = f"node {self._node_rank}", said, _LOCAL_RANK.match(said)
        if match:
            name, text = f"rank {self._node_rank * self._processes_per_node + int(match[1])}", match[2]
        self.last_lines.setdefault(name, deque(maxlen=NUM_LAST_LINES)).append(Line(stamp, text))
        sys.stderr.write(f"[{name}] {text}\n")
        sys.stderr.flush()
        heard()
        if text.startswith(FINAL_ERROR):
            self.final_error = self.final_error or text.removeprefix(FINAL_ERROR)


def _second(line: str) -> str:
    return _split(line)[0][0]


def _split(line: str) -> tuple[tuple[str, str], str]:
    """Return a line's time as (seconds, padded nanoseconds), which compare, and its text."""
    stamp, _, text = line.partition(" ")
    match = _TIMESTAMP.fullmatch(stamp)
    if match is None:
        # A message of the kubelet itself, such as that a log was rotated away.
        return ("", ""), line
    return (match[1], (match[2] or "").ljust(9, "0")), text


def _is_in(pod: Mapping[str, Any], state: str) -> bool:
    return any(state in (status.get("state") or {}) for status in _statuses(pod))


def _statuses(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return pod["status"].get("containerStatuses") or []

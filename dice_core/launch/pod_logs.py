"""The logs of a job's pods as one stream, each line with the rank of the process that wrote it.

A log is followed until its pod has ended: a connection that breaks or falls silent is made again, and lines that were
shown are not shown twice. What a process printed last is kept, for the report of a failure: pods may be gone by then.
"""

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from dice_core.launch.failure_report import LastLines, Line
from dice_core.launch.job_spec import CONTAINER, REPLICA_INDEX_LABEL, REPLICA_TYPE_LABEL
from dice_core.launch.kubernetes import Cluster, is_passing, reason
from dice_core.launch.watch import lines
from dice_core.progress import log
from dice_core.training.job import FINAL_ERROR

NUM_LAST_LINES = 12
# torchrun --tee puts the role and the local rank in front.
_LOCAL_RANK = re.compile(r"\[[a-z]+(\d+)\]:(.*)")
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?\S*")
_CONNECT_SECONDS = 10.0
# Asked for again beyond the last line seen: clocks of nodes and of this machine need not agree.
_OVERLAP_SECONDS = 60
_FINISHED = ("Succeeded", "Failed")


def node_rank(pod: Mapping[str, Any]) -> int:
    """Return a pod's number among the nodes of its job: the Master is 0, Workers follow."""
    labels = pod["metadata"].get("labels") or {}
    index = int(labels.get(REPLICA_INDEX_LABEL, 0))
    return index + 1 if labels.get(REPLICA_TYPE_LABEL, "").lower() == "worker" else index


class PodLogs:
    """The logs of all pods of a job."""

    def __init__(self, cluster: Cluster, processes_per_node: int, on_final_error: Callable[[str], None]) -> None:
        """Take the cluster, what turns local ranks into ranks, and what to call with a process's final error.

        It is called in threads of this class.
        """
        self._cluster, self._processes_per_node = cluster, processes_per_node
        self._on_final_error = on_final_error
        self._logs: dict[str, _PodLog] = {}

    def update(self, pods: Mapping[str, Mapping[str, Any]]) -> None:
        """Follow pods that have started, and finish with those that have ended or are gone."""
        present = {pod["metadata"]["uid"]: pod for pod in pods.values()}
        for uid, pod in present.items():
            started = any("waiting" not in (status.get("state") or {}) for status in _statuses(pod))
            if uid not in self._logs and (started or pod["status"].get("phase") in ("Running", *_FINISHED)):
                self._logs[uid] = _PodLog(self._cluster, pod, self._processes_per_node, self._on_final_error)
                self._logs[uid].start()
        for uid, pod_log in self._logs.items():
            if uid not in present or present[uid]["status"].get("phase") in _FINISHED:
                pod_log.finish()

    def close(self, seconds: float) -> None:
        """Show what is left of every log, for at most so many seconds together, and show nothing after that."""
        deadline = time.monotonic() + seconds
        for pod_log in self._logs.values():
            pod_log.finish()
        for pod_log in self._logs.values():
            pod_log.join(max(0.0, deadline - time.monotonic()))
            pod_log.abandon()

    def last_lines(self) -> LastLines:
        """Return the last lines of each process."""
        merged: dict[str, list[Line]] = {}
        for pod_log in self._logs.values():
            for name, kept in pod_log.last_lines().items():
                # Pods that took each other's place share a name: the later comes later.
                merged[name] = [*merged.get(name, []), *kept][-NUM_LAST_LINES:]
        return merged


class _PodLog(threading.Thread):
    """A thread that follows the log of one pod, through restarts of its container."""

    def __init__(
        self,
        cluster: Cluster,
        pod: Mapping[str, Any],
        processes_per_node: int,
        on_final_error: Callable[[str], None],
    ) -> None:
        self._on_final_error = on_final_error
        self._pod = pod["metadata"]["name"]
        super().__init__(name=f"log-{self._pod}", daemon=True)
        self._cluster, self._patience = cluster, cluster.patience
        self._node_rank, self._processes_per_node = node_rank(pod), processes_per_node
        self._finished, self._abandoned = threading.Event(), threading.Event()
        self._newest: tuple[str, str] = ("", "")
        self._num_at_newest = 0
        self._newest_seen_at = 0.0
        self._lines: dict[str, deque[Line]] = {}
        self._lock = threading.Lock()

    def finish(self) -> None:
        """End with the lines that are there."""
        self._finished.set()

    def abandon(self) -> None:
        """Show nothing any more."""
        self._abandoned.set()

    def last_lines(self) -> dict[str, list[Line]]:
        with self._lock:
            return {name: list(kept) for name, kept in self._lines.items()}

    def run(self) -> None:
        pauses = self._patience.pauses()
        while not self._abandoned.is_set():
            is_last = self._finished.is_set()
            try:
                if self._read(follow=not is_last):
                    pauses = self._patience.pauses()
            except Exception as error:
                # 400: the container waits to start. 404: the pod is gone.
                status = getattr(error, "status", None)
                if status not in (400, 404) and not is_passing(error):
                    log(f"train: log of {self._pod}: {reason(error)}; it is not shown")
                    return
            if is_last:
                return
            self._finished.wait(next(pauses))

    def _read(self, *, follow: bool) -> bool:
        """Show the lines of one answer that have not been shown; return whether there was one."""
        since = {}
        if self._newest_seen_at:
            since["since_seconds"] = int(time.monotonic() - self._newest_seen_at) + _OVERLAP_SECONDS
        response = self._cluster.core.read_namespaced_pod_log(
            self._pod,
            self._cluster.namespace,
            container=CONTAINER,
            follow=follow,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(_CONNECT_SECONDS, self._patience.silence if follow else self._patience.drain),
            **since,
        )
        num_before, num_same = self._num_at_newest, 0
        resumed_at, has_new = self._newest, False
        try:
            for line in lines(response):
                stamp, text = _split(line)
                if self._abandoned.is_set():
                    break
                num_same += stamp == resumed_at
                if stamp < resumed_at or (stamp == resumed_at and num_same <= num_before):
                    continue
                self._remember(stamp)
                self._show(stamp, text)
                has_new = True
        finally:
            response.close()
        return has_new

    def _remember(self, stamp: tuple[str, str]) -> None:
        if stamp >= self._newest:
            self._num_at_newest = self._num_at_newest + 1 if stamp == self._newest else 1
            self._newest, self._newest_seen_at = stamp, time.monotonic()

    def _show(self, stamp: tuple[str, str], line: str) -> None:
        name, text, match = f"node {self._node_rank}", line, _LOCAL_RANK.match(line)
        if match:
            name, text = f"rank {self._node_rank * self._processes_per_node + int(match[1])}", match[2]
        with self._lock:
            self._lines.setdefault(name, deque(maxlen=NUM_LAST_LINES)).append(Line(stamp, text))
        sys.stderr.write(f"[{name}] {text}\n")
        sys.stderr.flush()
        if text.startswith(FINAL_ERROR):
            self._on_final_error(text.removeprefix(FINAL_ERROR))


def _split(line: str) -> tuple[tuple[str, str], str]:
    """Return a line's time as (seconds, padded nanoseconds), which compare, and its text."""
    stamp, _, text = line.partition(" ")
    match = _TIMESTAMP.fullmatch(stamp)
    if match is None:
        # A message of the kubelet itself, such as that a log was rotated away.
        return ("", ""), line
    return (match[1], (match[2] or "").ljust(9, "0")), text


def _statuses(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return pod["status"].get("containerStatuses") or []

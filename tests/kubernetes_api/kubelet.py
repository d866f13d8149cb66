"""A node of the stand-in cluster: runs the containers of pods as local processes, and keeps their logs.

Nothing is isolated: an image is the environment the tests run in, mounted volumes are folders named by `variables`.
"""

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from dice_core.child_processes import end_with_parent
from tests.kubernetes_api.server import ApiServer, make_event
from tests.kubernetes_api.store import EVENT, POD, SECRET, Object, StatusError, now

_REPOSITORY = Path(__file__).parents[2]
_FIELD = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


@dataclass
class _Container:
    """The container of one pod, through its restarts."""

    pod: Object
    process: subprocess.Popen[bytes] | None = None
    is_reading: bool = False
    lines: list[tuple[int, datetime, bytes]] = field(default_factory=list)
    """Of each start (counted by the restarts before it), when it came, and the text."""
    num_restarts: int = 0
    started_at: str = ""
    last_end: Object | None = None
    restart_at: float = 0.0
    is_over: bool = False


class Kubelet:
    """The one node. Reads and writes the store of an API server, as a kubelet does through the API."""

    def __init__(self, api: ApiServer, variables: Mapping[str, str] | None = None, node: str = "node-1") -> None:
        """Take the API server, and environment variables that win over those of any pod."""
        self._api, self._store, self._node = api, api.store, node
        self._variables = dict(variables or {})
        self._containers: dict[str, _Container] = {}
        self.image_pull_fails = False
        """Pods that are created meanwhile hang in ImagePullBackOff."""
        self.restart_seconds = 0.1
        """After which a container that failed is started again; a real kubelet waits 10 s and more."""
        self.pull_error = 'Back-off pulling image "{image}"'
        api.logs = self.read_logs

    def sync(self) -> None:
        """Bring processes and pods' states into line, once."""
        pods = {pod["metadata"]["uid"]: pod for pod in self._store.find(POD, "")}
        for uid, container in list(self._containers.items()):
            if uid not in pods:
                self._kill(container)
        for uid, pod in pods.items():
            if pod["metadata"].get("deletionTimestamp"):
                self._end_deleted(uid, pod)
            elif pod["status"]["phase"] in ("Pending", "Running"):
                self._sync_pod(uid, pod)

    def evict(self, name: str, namespace: str = "default") -> None:
        """End a pod because its node runs out of memory."""
        pod = self._store.get(POD, namespace, name)
        container = self._containers[pod["metadata"]["uid"]]
        container.is_over = True
        self._kill(container)
        message = "The node was low on resource: memory."
        self._store.create(EVENT, namespace, make_event(pod, "Evicted", message))
        status = {"phase": "Failed", "reason": "Evicted", "message": message}
        # A kubelet reports what became of the container only when it still can; here it cannot.
        self._store.patch(POD, namespace, name, {"status": {**status, "containerStatuses": None}}, only_status=True)

    def rotate(self, name: str, namespace: str = "default") -> None:
        """Begin a new log file for a pod, as when the old one has grown large, which nobody can read from then on."""
        pod = self._store.get(POD, namespace, name)
        self._containers[pod["metadata"]["uid"]].lines.clear()

    def stop(self) -> None:
        """Kill every process."""
        for container in self._containers.values():
            container.is_over = True
            self._kill(container)

    def read_logs(self, namespace: str, name: str, parameters: Mapping[str, str]) -> Iterator[bytes]:
        """Yield a pod's log as the API's `log` subresource does; see ApiServer.logs."""
        pod = self._store.get(POD, namespace, name)
        wanted = parameters.get("container", "")
        if wanted not in [container["name"] for container in pod["spec"]["containers"]]:
            raise StatusError(400, f"container {wanted} is not valid for pod {name}")
        container = self._containers.get(pod["metadata"]["uid"])
        if container is None or not container.started_at:
            raise StatusError(400, f'container "{wanted}" in pod "{name}" is waiting to start: ContainerCreating')
        since = parameters.get("sinceTime", "")
        # One that waits to be started again shows what it said before, asked for either way.
        is_previous = parameters.get("previous") in ("true", "True") and container.process is not None
        wanted_run = container.num_restarts - is_previous
        if parameters.get("previous") in ("true", "True") and container.last_end is None:
            raise StatusError(400, f'previous terminated container "{wanted}" in pod "{name}" not found')
        yield b""
        for run, stamp, line in list(container.lines):
            seconds = f"{stamp:%Y-%m-%dT%H:%M:%S}Z"
            if run == wanted_run and seconds >= since:
                nanoseconds = f"{stamp:%Y-%m-%dT%H:%M:%S.%f}000Z ".encode()
                yield (nanoseconds if parameters.get("timestamps") in ("true", "True") else b"") + line

    def _sync_pod(self, uid: str, pod: Object) -> None:
        container = self._containers.get(uid)
        if container is None:
            if self.image_pull_fails:
                self._report_pull_failure(pod)
                return
            container = self._containers[uid] = _Container(pod)
        if container.is_over:
            return
        if container.process is None:
            if time.monotonic() >= container.restart_at:
                self._start(container)
        elif container.process.poll() is not None and not container.is_reading:
            self._end(container, container.process.returncode)

    def _report_pull_failure(self, pod: Object) -> None:
        if pod["status"].get("containerStatuses"):
            return
        image = pod["spec"]["containers"][0]["image"]
        message = self.pull_error.format(image=image)
        self._store.create(EVENT, pod["metadata"]["namespace"], make_event(pod, "Failed", f"Failed to pull {image}"))
        state = {"waiting": {"reason": "ImagePullBackOff", "message": message}}
        self._write(pod, "Pending", state, _Container(pod))

    def _start(self, container: _Container) -> None:
        spec = container.pod["spec"]["containers"][0]
        container.started_at = now()
        # Counted when it starts again, not while it waits for that.
        container.num_restarts += container.last_end is not None
        container.process = subprocess.Popen(
            [*spec["command"], *spec.get("args", [])],
            env=self._environment(container.pod, spec),
            cwd=_REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
        container.is_reading = True
        threading.Thread(target=self._read, args=(container, container.process), daemon=True).start()
        state = {"running": {"startedAt": container.started_at}}
        self._write(container.pod, "Running", state, container)

    def _read(self, container: _Container, process: subprocess.Popen[bytes]) -> None:
        for line in process.stdout or ():
            container.lines.append((container.num_restarts, datetime.now(UTC), line))
        process.wait()
        container.is_reading = False

    def _end(self, container: _Container, return_code: int) -> None:
        exit_code = return_code if return_code >= 0 else 128 - return_code
        policy = container.pod["spec"].get("restartPolicy", "Always")
        ended = {
            "exitCode": exit_code,
            "reason": "Error" if exit_code else "Completed",
            "startedAt": container.started_at,
            "finishedAt": now(),
        }
        if exit_code and policy in ("OnFailure", "Always"):
            waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}}
            container.process, container.last_end = None, {"terminated": ended}
            container.restart_at = time.monotonic() + self.restart_seconds
            self._write(container.pod, "Running", waiting, container)
        else:
            container.is_over = True
            phase = "Failed" if exit_code else "Succeeded"
            self._write(container.pod, phase, {"terminated": ended}, container)

    def _write(self, pod: Object, phase: str, state: Object, container: _Container) -> None:
        status: dict[str, Any] = {
            "name": pod["spec"]["containers"][0]["name"],
            "image": pod["spec"]["containers"][0]["image"],
            "imageID": "",
            "ready": "running" in state,
            "restartCount": container.num_restarts,
            "state": state,
        }
        if container.last_end:
            status["lastState"] = container.last_end
        conditions = [{"type": "PodScheduled", "status": "True"}]
        patch = {"phase": phase, "containerStatuses": [status], "conditions": conditions}
        metadata = pod["metadata"]
        try:
            if not pod["spec"].get("nodeName"):
                pod["spec"]["nodeName"] = self._node
                self._store.patch(POD, metadata["namespace"], metadata["name"], {"spec": {"nodeName": self._node}})
            self._store.patch(POD, metadata["namespace"], metadata["name"], {"status": patch}, only_status=True)
        except StatusError as error:
            if error.code != 404:
                raise

    def _end_deleted(self, uid: str, pod: Object) -> None:
        container = self._containers.get(uid)
        if container is not None:
            container.is_over = True
            self._kill(container)
        self._store.delete(POD, pod["metadata"]["namespace"], pod["metadata"]["name"], uid)

    def _kill(self, container: _Container) -> None:
        if container.process is not None and container.process.poll() is None:
            # It may end by itself meanwhile, and be reaped by the thread that reads it.
            with suppress(ProcessLookupError):
                os.killpg(container.process.pid, signal.SIGKILL)
            container.process.wait()

    def _environment(self, pod: Object, spec: Object) -> dict[str, str]:
        values = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(_REPOSITORY),
            "HOSTNAME": pod["metadata"]["name"],
        }
        for variable in spec.get("env", ()):
            values[variable["name"]] = variable.get("value") or self._reference(pod, variable)
        return {**values, **self._variables}

    def _reference(self, pod: Object, variable: Object) -> str:
        source = variable.get("valueFrom") or {}
        if field := source.get("fieldRef"):
            kind, name = _FIELD.fullmatch(field["fieldPath"]).groups()  # type: ignore[union-attr]
            return str(pod["metadata"][kind][name])
        reference = source.get("secretKeyRef")
        if reference is None:
            return ""
        secret = self._store.get(SECRET, pod["metadata"]["namespace"], reference["name"])
        return base64.b64decode(secret["data"][reference["key"]]).decode()

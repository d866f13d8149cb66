"""Follow a set of objects of a Kubernetes API: list once, then watch, and survive whatever ends a watch.

A watch ends often and for no fault: the server's timeout, a restart, a lost connection, an expired version (410). All
but the last resume where they ended; the last lists again. Who follows sees states and never misses the newest.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kubernetes.client import ApiException

from dice_core.launch.kubernetes import Cluster, KubernetesError, is_passing, reason

_CONNECT_SECONDS = 10.0
_GONE = 410
Objects = dict[str, dict[str, Any]]


class Watch(threading.Thread):
    """A thread that hands every change of a set of objects on."""

    def __init__(
        self,
        what: str,
        cluster: Cluster,
        list_objects: Callable[..., Any],
        on_change: Callable[[Objects], None],
        on_error: Callable[[KubernetesError], None],
    ) -> None:
        """Take what to follow.

        Args:
            what: the objects' name, for messages.
            cluster: gives the waiting times.
            list_objects: lists them, or watches with watch=True; takes the keywords of the Kubernetes client.
            on_change: called in this thread with all objects by name, after each change and once at the start.
            on_error: called in this thread when following has ended for good.
        """
        super().__init__(name=f"watch-{what}", daemon=True)
        self._what, self._cluster, self._patience = what, cluster, cluster.patience
        self._list_objects, self._on_change, self._on_error = list_objects, on_change, on_error
        self._objects: Objects = {}
        self._version = ""
        self._stopped = threading.Event()
        self._failing_since = 0.0

    def stop(self) -> None:
        """Hand nothing on any more; the thread ends with its next answer."""
        self._stopped.set()

    def run(self) -> None:
        """Follow until stopped."""
        pauses = self._patience.pauses()
        while not self._stopped.is_set():
            try:
                if not self._version:
                    self._list()
                    pauses = self._patience.pauses()
                if self._watch():
                    pauses = self._patience.pauses()
                else:
                    self._stopped.wait(self._patience.first_pause)
            except Exception as error:
                if isinstance(error, ApiException) and error.status == _GONE:
                    self._version = ""
                elif not self._is_worth_waiting(error):
                    return
                self._stopped.wait(next(pauses))

    def _is_worth_waiting(self, error: Exception) -> bool:
        if not is_passing(error):
            message = f"may not follow {self._what} in {self._cluster.namespace}: {reason(error)}"
            self._hand_on_error(KubernetesError(f"{message} (make preflight names the missing right)"))
            return False
        self._failing_since = self._failing_since or time.monotonic()
        if time.monotonic() - self._failing_since > self._patience.give_up:
            self._hand_on_error(self._cluster.unreachable(error))
            return False
        if not self._stopped.is_set():
            self._cluster.say_retry(f"following {self._what}", error)
        return True

    def _hand_on_error(self, error: KubernetesError) -> None:
        if not self._stopped.is_set():
            self._on_error(error)

    def _list(self) -> None:
        response = self._list_objects(_preload_content=False, _request_timeout=(_CONNECT_SECONDS, 60.0))
        listed = json.loads(response.data)
        self._answered()
        self._objects = {item["metadata"]["name"]: item for item in listed["items"]}
        self._version = str(listed["metadata"]["resourceVersion"])
        self._hand_on()

    def _watch(self) -> bool:
        """Hand changes on until the server ends the watch; return whether there was an event.

        Raises:
            ApiException: 410, as status or as an event.
        """
        response = self._list_objects(
            watch=True,
            resource_version=self._version,
            allow_watch_bookmarks=True,
            timeout_seconds=int(self._patience.watch) or 1,
            _preload_content=False,
            _request_timeout=(_CONNECT_SECONDS, self._patience.watch + 30),
        )
        try:
            had_event = False
            for line in lines(response):
                if self._stopped.is_set():
                    break
                self._answered()
                self._apply(json.loads(line))
                had_event = True
            return had_event
        finally:
            response.close()

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind, item = event["type"], event["object"]
        if kind == "ERROR":
            raise ApiException(status=item.get("code", 0), reason=item.get("message", ""))
        metadata = item["metadata"]
        if kind == "DELETED":
            self._objects.pop(metadata["name"], None)
        elif kind != "BOOKMARK":
            self._objects[metadata["name"]] = item
        self._version = str(metadata["resourceVersion"])
        if kind != "BOOKMARK":
            self._hand_on()

    def _hand_on(self) -> None:
        if not self._stopped.is_set():
            self._on_change(dict(self._objects))

    def _answered(self) -> None:
        self._failing_since = 0.0


def lines(response: Any) -> Iterator[str]:
    """Yield the lines of a streamed answer as they come. What a lost connection cuts off is an error and no line."""
    rest = b""
    for chunk in response.stream(amt=None, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line:
                yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")

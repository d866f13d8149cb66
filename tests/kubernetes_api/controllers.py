"""What runs beside the API server of the stand-in cluster: controllers, the garbage collector and one node."""

import socket
import threading
from collections.abc import Mapping
from typing import Self

from tests.kubernetes_api.kubelet import Kubelet
from tests.kubernetes_api.server import ApiServer
from tests.kubernetes_api.store import FOREGROUND, KINDS, POD, Kind, Object, StatusError


class ForegroundDeletion:
    """Deletes what is deleted in the foreground once nothing is left that it owns; a context manager."""

    def __init__(self, api: ApiServer, *, period: float = 0.03) -> None:
        """Take the API server."""
        self._store, self._period = api.store, period
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self._period):
                self._step()
        except Exception as error:
            self.error = error

    def _step(self) -> None:
        everything = [(kind, item) for kind in KINDS for item in self._store.find(kind, "")]
        going = {item["metadata"]["uid"] for _, item in everything if _waits_for_its_own(item)}
        owning = {owner["uid"] for _, item in everything for owner in _owners(item)}
        for kind, item in everything:
            if _waits_for_its_own(item) and item["metadata"]["uid"] not in owning:
                self._store.finalize(kind, item)
            elif going.intersection(owner["uid"] for owner in _owners(item)):
                self._delete(kind, item, in_foreground=kind is not POD)

    def _delete(self, kind: Kind, item: Object, *, in_foreground: bool = False) -> None:
        metadata = item["metadata"]
        if _waits_for_its_own(item):
            return
        is_on_a_node = kind is POD and bool(item["spec"].get("nodeName"))
        place = (metadata.get("namespace", ""), metadata["name"], metadata["uid"])
        try:
            self._store.delete(kind, *place, gracefully=is_on_a_node, in_foreground=in_foreground)
        except StatusError as error:
            if error.code not in (404, 409):
                raise


class Controllers(ForegroundDeletion):
    """The garbage collector and one node behind an API server, and what a subclass controls; a context manager."""

    def __init__(self, api: ApiServer, variables: Mapping[str, str] | None = None, *, period: float = 0.03) -> None:
        """Take the API server, and variables for every process of a pod (see Kubelet)."""
        super().__init__(api, period=period)
        self.kubelet = Kubelet(api, variables)
        self._ports: dict[str, int] = {}

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.kubelet.stop()
        super().__exit__()

    def _step(self) -> None:
        super()._step()
        self._collect_orphans()
        self._reconcile_all()
        self.kubelet.sync()

    def _reconcile_all(self) -> None:
        """Bring what the controllers control into line."""
        raise NotImplementedError

    def _collect_orphans(self) -> None:
        everything = [(kind, item) for kind in KINDS for item in self._store.find(kind, "")]
        alive = {item["metadata"]["uid"] for _, item in everything}
        for kind, item in everything:
            owners = [owner["uid"] for owner in _owners(item)]
            if owners and not alive.intersection(owners):
                self._delete(kind, item)

    def _patch_status(self, kind: Kind, item: Object, status: Object) -> Object:
        metadata = item["metadata"]
        try:
            patch = {"status": status}
            return self._store.patch(kind, metadata["namespace"], metadata["name"], patch, only_status=True)
        except StatusError as error:
            if error.code != 404:
                raise
            return item

    def _port_of(self, job: Object) -> str:
        """Return where a job's processes meet: one machine stands for all nodes, and its jobs may run together."""
        return str(self._ports.setdefault(job["metadata"]["uid"], _free_port()))


def _owners(item: Object) -> list[Object]:
    return item["metadata"].get("ownerReferences") or []


def _waits_for_its_own(item: Object) -> bool:
    return FOREGROUND in (item["metadata"].get("finalizers") or [])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""The Kubernetes API: calls by path, faults of one line, and patience with a server that is away for a while.

An API server that restarts or is overloaded stops no training: a launcher repeats its calls with growing pauses until
its patience ends. Commands of people make each call once. Objects are plain dicts as the API's JSON has them. What the
objects mean is not known here: jobs.py, failure_report.py.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dice_core.launch.connection_errors import innermost
from dice_core.progress import Throttle, log
from dice_core.storage.outages import doubled

_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_FORBIDDEN, _NOT_FOUND, _CONFLICT = 403, 404, 409
# 401 passes when the token that the kubelet has renewed is read.
_PASSING = {401, 408, 429, 500, 502, 503, 504}
_CONNECT_SECONDS = 10.0
_JSON, _MERGE_PATCH = "application/json", "application/merge-patch+json"


class KubernetesError(RuntimeError):
    """The API refused a call, or did not answer. One line: what was asked, the answer, what to do."""

    def __init__(self, message: str, status: int = 0, detail: str = "") -> None:
        """Take the line; where there was an answer, its HTTP status and what it said."""
        super().__init__(message)
        self.status = status
        self.detail = detail or message
        """The status and the server's own words."""


class ForbiddenError(KubernetesError):
    """Whoever asks may not."""


@dataclass(frozen=True)
class JobPatience:
    """How long a launcher waits for what, in seconds. The tests take shorter ones."""

    first_pause: float = 1.0
    longest_pause: float = 30.0
    give_up: float = 1800.0
    """An API that does not answer for so long ends the launcher; the job goes on, and a retry adopts it."""
    poll: float = 5.0
    """How often to look at the job, its pods and their logs."""
    reminder: float = 60.0
    """How often to say that pods still do not start."""
    restart: float = 10.0
    """Before a job that has failed is made anew; twice as long each time."""
    longest_restart: float = 300.0
    """As the kubelet, which waits no longer before it starts a container again."""
    drain: float = 30.0
    """How long a process that has said its last word may take to end."""
    stop: float = 20.0
    """How long a launcher that was told to stop tries to delete the job."""

    def pauses(self) -> Iterator[float]:
        """Return growing pauses, without end."""
        return (doubled(self.first_pause, self.longest_pause, num_tries) for num_tries in itertools.count(1))

    def before_restart(self, number: int) -> float:
        """Return how long to wait before a job is made anew for the first time, the second, and so on."""
        return doubled(self.restart, self.longest_restart, number)


class KubernetesApi:
    """A connection to the API of a cluster, and a namespace of it."""

    def __init__(
        self, namespace: str = "", *, context: str = "", patience: JobPatience | None = None, timeout: float = 10.0
    ) -> None:
        """Take a context of the kubeconfig (the current one if empty), or a pod's own account; makes no call.

        Args:
            namespace: of all calls; empty: the pod's own, or the context's.
            context: of the kubeconfig.
            patience: waiting times of calls that are repeated; by default a call is made once.
            timeout: of one call, in seconds.

        Raises:
            KubernetesError: there is neither an account nor a kubeconfig.
        """
        self._client, home = _connect(context)
        self.namespace = namespace or home
        self.host = str(self._client.configuration.host)
        self.patience, self._timeouts = patience, (min(timeout, _CONNECT_SECONDS), timeout)
        self._has_answered = False
        self._reminder: Throttle | None = None

    def get(self, path: str, **query: str) -> dict[str, Any] | None:
        """Return what is at a path of the API, or None where there is nothing."""
        data = self._call("GET", path, query)
        return None if data is None else dict(json.loads(data))

    def list(self, path: str, **query: str) -> list[dict[str, Any]]:
        """Return the items of a list; none where the API does not know the kind."""
        found = self.get(path, **query)
        return list(found["items"]) if found else []

    def named(self, resource: str, name: str) -> dict[str, Any] | None:
        """Return an object of the namespace, such as a `configmaps`, or None where there is none."""
        return self.get(self.path(resource, name))

    def text(self, path: str, **query: str) -> str:
        """Return a log; it is asked for once, however patient this connection is."""
        return (self._request("GET", path, query) or b"").decode(errors="replace")

    def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Create an object; None: there is one of its name."""
        data = self._call("POST", path, {}, body)
        return None if data is None else dict(json.loads(data))

    def patch(self, path: str, change: Mapping[str, Any]) -> bool:
        """Change an object by a JSON merge patch; False: it is gone, or another has its name."""
        return self._call("PATCH", path, {}, change) is not None

    def delete(self, path: str, uid: str = "", *, propagation: str = "Background") -> bool:
        """Delete an object and what belongs to it; False: it is gone already, or another has its name.

        Args:
            path: of the object.
            uid: of it; empty: whichever has the name.
            propagation: `Background`: at once, and then what belongs to it; `Foreground`: the other way round.
        """
        options: dict[str, Any] = {"propagationPolicy": propagation}
        return self._call("DELETE", path, {}, options | ({"preconditions": {"uid": uid}} if uid else {})) is not None

    def may(self, account: str, verb: str, group: str, resource: str) -> bool:
        """Return whether a service account of the namespace, or with none whoever asks, has a right in it.

        Raises:
            ForbiddenError: the person who asks may not ask that.
        """
        accounts = "system:serviceaccounts"
        resource, _, subresource = resource.partition("/")
        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": resource}
        spec: dict[str, Any] = {
            "resourceAttributes": attributes | ({"subresource": subresource} if subresource else {})
        }
        # Whoever administers the namespace alone may create the local kind; everybody the one about oneself.
        kind, path = "SelfSubjectAccessReview", "selfsubjectaccessreviews"
        if account:
            spec["user"] = f"system:serviceaccount:{self.namespace}:{account}"
            spec["groups"] = [accounts, f"{accounts}:{self.namespace}", "system:authenticated"]
            kind, path = "LocalSubjectAccessReview", f"namespaces/{self.namespace}/localsubjectaccessreviews"
        metadata = {"namespace": self.namespace} if account else {}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "metadata": metadata, "spec": spec}
        found = self.create(f"/apis/authorization.k8s.io/v1/{path}", review) or {}
        return bool(found.get("status", {}).get("allowed"))

    def path(self, resource: str, name: str = "", *, group: str = "", version: str = "v1", namespace: str = "") -> str:
        """Return the path of a resource of the namespace, or of another one."""
        prefix = f"/apis/{group}/{version}" if group else f"/api/{version}"
        return f"{prefix}/namespaces/{namespace or self.namespace}/{resource}" + (f"/{name}" if name else "")

    def hurry(self, timeout: float, *, give_up: float) -> None:
        """From now on wait so many seconds for one answer, and ask again for `give_up` seconds only."""
        self.patience = replace(self.patience or JobPatience(), first_pause=0.05, longest_pause=0.5, give_up=give_up)
        self._timeouts = (timeout, timeout)

    def _call(self, method: str, path: str, query: Mapping[str, str], body: Any = None) -> bytes | None:
        """Return the answer, asking again while patience lasts and it may help; None: nothing there, or a conflict."""
        if self.patience is None:
            return self._request(method, path, query, body)
        start, pauses = time.monotonic(), self.patience.pauses()
        while True:
            try:
                data = self._request(method, path, query, body)
                # A proxy in between may answer with a page of its own.
                if data is not None:
                    json.loads(data)
                self._has_answered = True
                return data
            except (KubernetesError, json.JSONDecodeError) as error:
                pause = next(pauses)
                if not self._may_pass(error):
                    raise
                if time.monotonic() - start + pause > self.patience.give_up:
                    away = f"the Kubernetes API at {self.host} has not answered for {self.patience.give_up:.0f} s"
                    raise KubernetesError(f"{away}: {detail(error)}") from None
                self._say_retry(f"{method} {path}", error)
                time.sleep(pause)

    def _may_pass(self, error: Exception) -> bool:
        if not isinstance(error, KubernetesError):
            return True
        # Credentials or certificates that are refused from the start are wrong; later that may pass.
        is_rejected = error.status == 401 or (not error.status and "certificate" in str(error).lower())
        return (not error.status or error.status in _PASSING) and (self._has_answered or not is_rejected)

    def _request(self, method: str, path: str, query: Mapping[str, str], body: Any = None) -> bytes | None:
        import urllib3
        from kubernetes.client import ApiException

        try:
            response = self._client.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Accept": "*/*", "Content-Type": _MERGE_PATCH if method == "PATCH" else _JSON},
                body=body,
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _preload_content=False,
                _request_timeout=self._timeouts,
            )
            return bytes(response.data)
        except ApiException as error:
            if error.status == 0:
                raise self._unreachable(error) from None
            if error.status == _NOT_FOUND and method != "POST":
                return None
            if error.status == _CONFLICT:
                return None
            raise _refusal(method, path, error) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> KubernetesError:
        why = innermost(error)
        line = f"{self.host}: the Kubernetes API cannot be reached ({why}): is it up, the context right?"
        return KubernetesError(line, detail=f"{type(error).__name__}: {why}")

    def _say_retry(self, what: str, error: Exception) -> None:
        """Log that a call is made again: once in a while, for all calls together."""
        if self._reminder is None or self._reminder.is_due():
            self._reminder = self._reminder or Throttle((self.patience or JobPatience()).reminder)
            log(f"train: {what}: {detail(error)}; trying again")


def detail(error: Exception) -> str:
    """Return what the API said, in one line."""
    return error.detail if isinstance(error, KubernetesError) else f"{type(error).__name__}: {error}".splitlines()[0]


def _refusal(method: str, path: str, error: Any) -> KubernetesError:
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
    try:
        said = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        said = body.strip() or str(error.reason)
    said = " ".join(said.split())
    kind = ForbiddenError if error.status == _FORBIDDEN else KubernetesError
    return kind(f"{method} {path}: HTTP {error.status}, {said}", error.status, f"{error.status} {said}")


def own_pod() -> tuple[str, str] | None:
    """Return this pod's name and namespace as its environment tells them; None outside a cluster."""
    if "KUBERNETES_SERVICE_HOST" not in os.environ:
        return None
    names = (os.environ.get(name) for name in ("POD_NAME", "KFP_POD_NAME", "HOSTNAME"))
    name = next((name for name in names if name), "")
    namespace = os.environ.get("POD_NAMESPACE") or _account_namespace()
    return (name, namespace) if name and namespace else None


def _account_namespace() -> str:
    return _ACCOUNT_NAMESPACE.read_text().strip() if _ACCOUNT_NAMESPACE.is_file() else ""


def _connect(context: str) -> tuple[Any, str]:
    """Return a client and the namespace it belongs to: by the kubeconfig, else by the pod's own account."""
    from kubernetes import client, config

    settings = client.Configuration()
    # Our own pauses are longer than urllib3's, and end earlier when a person stops us.
    settings.retries = False
    # The client reads the variable once, when it is imported.
    file = os.environ.get("KUBECONFIG")
    try:
        config.load_kube_config(file, context or None, client_configuration=settings)
        contexts, current = config.list_kube_config_contexts(file)
    except config.ConfigException as error:
        fault = " ".join(str(error).split())
    else:
        chosen = next((entry for entry in contexts if entry["name"] == context), current)
        home = chosen["context"].get("namespace") or os.environ.get("POD_NAMESPACE") or "default"
        return client.ApiClient(settings), home
    try:
        if context:
            raise config.ConfigException(fault)
        # The account's token is renewed on disk; this loader reads it again.
        config.load_incluster_config(client_configuration=settings)
    except config.ConfigException:
        raise KubernetesError(
            f"no cluster to talk to: no service account here, and {fault.rstrip('.')}: set KUBECONFIG, or name a "
            "context of it: CONTEXT=..."
        ) from None
    return client.ApiClient(settings), os.environ.get("POD_NAMESPACE") or _account_namespace() or "default"

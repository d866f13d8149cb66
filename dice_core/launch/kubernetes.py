"""Calls to a Kubernetes API that may be away for a while: which errors pass, how long to wait, what a final one says.

An API server that restarts or is overloaded stops no training: calls are repeated with growing pauses until the
patience ends. Objects are plain dicts as the API's JSON has them.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config

from dice_core.launch.job_spec import GROUP, JOB_NAME_LABEL, PLURAL, VERSION
from dice_core.progress import Throttle, log
from dice_core.settings.base import ConfigError

_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# 401 passes when the token that the kubelet has renewed is read.
_PASSING = {401, 408, 429, 500, 502, 503, 504}
_CONNECT_SECONDS = 10.0
_KUEUE, _JOB_UID_LABEL = ("kueue.x-k8s.io", "v1beta2"), "kueue.x-k8s.io/job-uid"


class KubernetesError(RuntimeError):
    """The API refused a call, or did not answer for too long. One line: what was asked, the answer, what to do."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds. The tests take shorter ones."""

    first_pause: float = 1.0
    longest_pause: float = 30.0
    give_up: float = 1800.0
    """An API that does not answer for so long ends the launcher; the job goes on, and a retry adopts it."""
    watch: float = 240.0
    """The server ends a watch after that long; it is taken up again where it ended."""
    silence: float = 300.0
    """A log that brings nothing for that long is asked for again: a dead connection looks just like it."""
    reminder: float = 60.0
    """How often to say that pods still do not start."""
    drain: float = 30.0
    """How long to wait for the last log lines when the job has ended."""
    stop: float = 20.0
    """How long a launcher that was told to stop tries to delete the job."""

    def pauses(self) -> Iterator[float]:
        """Yield growing pauses."""
        pause = self.first_pause
        while True:
            yield pause
            pause = min(2 * pause, self.longest_pause)


def is_passing(error: Exception) -> bool:
    """Return whether the same call may succeed later."""
    if isinstance(error, client.ApiException):
        return error.status in _PASSING or error.status == 0
    # A proxy in between may answer with a page of its own.
    return isinstance(error, urllib3.exceptions.HTTPError | OSError | json.JSONDecodeError)


def _is_rejection(error: Exception) -> bool:
    """Return whether credentials or certificates were refused: from the start that is wrong, later it may pass."""
    return isinstance(error, client.ApiException) and error.status in (0, 401)


def reason(error: Exception) -> str:
    """Return what the API said, in one line: the message of its Status if there is one."""
    if not isinstance(error, client.ApiException):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        message = body.strip() or str(error.reason)
    return f"{error.status} {' '.join(message.split())}"


class Cluster:
    """The API of a cluster, and the namespace in which training runs."""

    def __init__(self, namespace: str, patience: Patience, timeout: float = 60.0) -> None:
        """Connect with the pod's own account inside a cluster, else with the current context of the kubeconfig.

        Args:
            namespace: where training runs; empty: the pod's own, or the context's.
            patience: waiting times.
            timeout: of one call that is not a watch.

        Raises:
            ConfigError: there is neither an account nor a kubeconfig.
        """
        settings, self.home = _connection()
        # Our own pauses are longer than urllib3's, and end earlier when a person stops us.
        settings.retries = False
        self.namespace = namespace or self.home
        self.host = settings.host
        self.patience, self._timeouts = patience, (_CONNECT_SECONDS, timeout)
        self._has_answered = False
        self._retry_reminder: Throttle | None = None
        self._retry_lock = threading.Lock()
        self._client = client.ApiClient(settings)
        self.core = client.CoreV1Api(self._client)
        self.custom = client.CustomObjectsApi(self._client)

    def call(self, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return the JSON answer of a call, asking again while it may help.

        Raises:
            KubernetesError: no answer in time.
            client.ApiException: the API refused it.
        """
        start, pauses = time.monotonic(), self.patience.pauses()
        while True:
            try:
                response = function(*arguments, _preload_content=False, _request_timeout=self._timeouts, **options)
                answer = json.loads(response.data)
                self._has_answered = True
                return answer
            except Exception as error:
                pause = next(pauses)
                if not is_passing(error) or (_is_rejection(error) and not self._has_answered):
                    raise
                if time.monotonic() - start + pause > self.patience.give_up:
                    raise self.unreachable(error) from None
                self.say_retry(what, error)
                time.sleep(pause)

    def hurry(self, timeout: float, *, give_up: float) -> None:
        """From now on wait so many seconds for one answer, and ask again for `give_up` seconds only."""
        self.patience = replace(self.patience, first_pause=0.05, longest_pause=0.5, give_up=give_up)
        self._timeouts = (timeout, timeout)

    def say_retry(self, what: str, error: Exception) -> None:
        """Log that a call is made again: once in a while, for all calls together."""
        with self._retry_lock:
            if self._retry_reminder is None or self._retry_reminder.is_due():
                self._retry_reminder = self._retry_reminder or Throttle(self.patience.reminder)
                log(f"train: {what}: {reason(error)}; trying again")

    def unreachable(self, error: Exception) -> KubernetesError:
        """Return the error of an API that has not answered for too long."""
        return KubernetesError(
            f"the Kubernetes API at {self.host} has not answered for {self.patience.give_up:.0f} s: {reason(error)}"
        )

    def get_job(self, name: str) -> dict[str, Any] | None:
        """Return the PyTorchJob, or None."""
        try:
            get = self.custom.get_namespaced_custom_object
            found: dict[str, Any] = self.call(f"get job {name}", get, *self._jobs(), name)
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise self._refused(f"may not get pytorchjobs in {self.namespace}", error) from None
        return found

    def create_job(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Create a PyTorchJob; None: there is one of this name already."""
        what = f"create job {body['metadata']['name']}"
        try:
            create = self.custom.create_namespaced_custom_object
            created: dict[str, Any] = self.call(what, create, *self._jobs(), body)
        except client.ApiException as error:
            if error.status == 409:
                return None
            hint = "is the training operator installed? make preflight tells" if error.status == 404 else ""
            raise self._refused(f"the cluster did not take the training job in {self.namespace}", error, hint) from None
        return created

    def delete_job(self, name: str, uid: str) -> None:
        """Delete this PyTorchJob and its pods; one that is gone already, or another of its name, is left alone.

        An empty uid means whichever has the name.
        """
        options: dict[str, Any] = {"propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            delete = self.custom.delete_namespaced_custom_object
            self.call(f"delete job {name}", delete, *self._jobs(), name, body=options)
        except client.ApiException as error:
            if error.status not in (404, 409):
                raise self._refused(f"may not delete pytorchjobs in {self.namespace}", error) from None

    def set_owner(self, name: str, uid: str, owner: Mapping[str, Any]) -> None:
        """Make an object the only owner of this PyTorchJob: with it the job is deleted, and with no other.

        Raises:
            client.ApiException: 403; 404 and 409: it is gone, or another has its name.
        """
        change = {"metadata": {"uid": uid, "ownerReferences": [dict(owner)]}}
        patch = self.custom.patch_namespaced_custom_object
        self.call(f"change the owner of job {name}", patch, *self._jobs(), name, change)

    def get_pod(self, name: str, namespace: str) -> dict[str, Any]:
        """Return a pod.

        Raises:
            client.ApiException: 404 and 403 among others.
        """
        pod: dict[str, Any] = self.call(f"get pod {name}", self.core.read_namespaced_pod, name, namespace)
        return pod

    def events(self, uid: str) -> list[dict[str, Any]]:
        """Return the events about an object, oldest first."""
        listed = self.call(
            "list events",
            self.core.list_namespaced_event,
            self.namespace,
            field_selector=f"involvedObject.uid={uid}",
        )
        return sorted(listed["items"], key=event_time)

    def workloads(self, job_uid: str) -> list[dict[str, Any]] | None:
        """Return what Kueue keeps of a job: none where there is no Kueue; None if it cannot be read."""
        selector = f"{_JOB_UID_LABEL}={job_uid}"
        try:
            listing = self.custom.list_namespaced_custom_object
            listed = self.call("list workloads", listing, *_KUEUE, self.namespace, "workloads", label_selector=selector)
        except (client.ApiException, KubernetesError) as error:
            return [] if isinstance(error, client.ApiException) and error.status == 404 else None
        return list(listed["items"])

    def watch_job(self, name: str, **options: Any) -> Any:
        """List or watch this one job; see CoreV1Api for options."""
        selector = f"metadata.name={name}"
        return self.custom.list_namespaced_custom_object(*self._jobs(), field_selector=selector, **options)

    def watch_pods(self, name: str, **options: Any) -> Any:
        """List or watch the pods of a job."""
        return self.core.list_namespaced_pod(self.namespace, label_selector=f"{JOB_NAME_LABEL}={name}", **options)

    def _jobs(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    def _refused(self, what: str, error: client.ApiException, hint: str = "") -> KubernetesError:
        if error.status == 403 and not hint:
            # A quota answers with 403 too, and its message says which of its numbers is reached.
            is_quota = "exceeded quota" in reason(error)
            hint = "raise that quota, or wait" if is_quota else "make preflight names the missing right"
        return KubernetesError(f"{what}: {reason(error)}" + (f" ({hint})" if hint else ""))


def event_time(event: Mapping[str, Any]) -> str:
    """Return when an event was last seen; older and newer reporters fill in different fields."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((str(value) for value in times if value), str(event["metadata"].get("creationTimestamp", "")))


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


def _connection() -> tuple[client.Configuration, str]:
    settings = client.Configuration()
    try:
        # The account's token is renewed on disk; this loader reads it again.
        config.load_incluster_config(client_configuration=settings)
        return settings, os.environ.get("POD_NAMESPACE") or _account_namespace() or "default"
    except config.ConfigException:
        # Not in a pod, or in one without an account.
        pass
    try:
        # The client reads the variable once, when it is imported.
        file = os.environ.get("KUBECONFIG")
        config.load_kube_config(file, client_configuration=settings)
        _, context = config.list_kube_config_contexts(file)
    except config.ConfigException as error:
        raise ConfigError(
            f"launch.backend: 'pytorchjob' needs a Kubernetes cluster: no service account here, and {error}; "
            "run it in a pod or set KUBECONFIG"
        ) from None
    return settings, context["context"].get("namespace") or os.environ.get("POD_NAMESPACE") or "default"

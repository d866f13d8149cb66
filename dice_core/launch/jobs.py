"""Training jobs of a kind, their pods, events and place in a queue: what a launcher asks of the Kubernetes API.

What a refusal means for training is said here; how calls are made and repeated, kubernetes.py knows.
"""

from collections.abc import Mapping
from typing import Any

from dice_core.launch.job_kind import JobKind
from dice_core.launch.job_spec import place_of
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError

_KUEUE, _KUEUE_VERSION, _JOB_UID_LABEL = "kueue.x-k8s.io", "v1beta2", "kueue.x-k8s.io/job-uid"
_NOT_FOUND, _FORBIDDEN = 404, 403


class TrainingJobs:
    """The jobs of a kind in the namespace of a connection."""

    def __init__(self, api: KubernetesApi, kind: JobKind) -> None:
        """Take the connection and the kind."""
        self.api, self.kind = api, kind
        self.namespace = api.namespace

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a job, or None."""
        try:
            return self.api.get(self._path(name))
        except KubernetesError as error:
            raise self._refused(f"may not get {self.kind.plural} in {self.namespace}", error) from None

    def create(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Create a job; None: there is one of this name already."""
        try:
            return self.api.create(self._path(), body)
        except KubernetesError as error:
            hint = f"is {self.kind.operator} installed? make preflight tells" if error.status == _NOT_FOUND else ""
            raise self._refused(f"the cluster did not take the training job in {self.namespace}", error, hint) from None

    def delete(self, name: str, uid: str) -> bool:
        """Delete this job and its pods; False: it is gone already, or another has its name.

        An empty uid means whichever has the name.
        """
        try:
            return self.api.delete(self._path(name), uid, propagation=self.kind.deletion)
        except KubernetesError as error:
            raise self._refused(f"may not delete {self.kind.plural} in {self.namespace}", error) from None

    def set_owner(self, name: str, uid: str, owner: Mapping[str, Any]) -> bool:
        """Make an object the only owner of this job: with it the job is deleted, and with no other.

        Returns:
            Whether the job is still there.
        """
        return self.api.patch(self._path(name), {"metadata": {"uid": uid, "ownerReferences": [dict(owner)]}})

    def pods(self, job: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the pods of a job by their names."""
        try:
            found = self.api.list(self.api.path("pods"), labelSelector=self.kind.pod_selector(job))
        except KubernetesError as error:
            raise self._refused(f"may not list pods in {self.namespace}", error) from None
        # Pods of a deleted job of this name may still be around.
        return {pod["metadata"]["name"]: pod for pod in found if self.kind.owns(job, pod)}

    def events(self, job: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the events about a job, oldest first; none of a job before it that had its name."""
        found = [event for about in self.kind.event_selectors(job) for event in self._events(about)]
        second = len("2026-01-01T00:00:00")
        made_at = str(job["metadata"].get("creationTimestamp", ""))[:second]
        return sorted((event for event in found if event_time(event)[:second] >= made_at), key=event_time)

    def pod_events(self, pod: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the events about a pod, oldest first."""
        return sorted(self._events(f"involvedObject.uid={pod['metadata']['uid']}"), key=event_time)

    def _events(self, selector: str) -> list[dict[str, Any]]:
        return self.api.list(self.api.path("events"), fieldSelector=selector)

    def workloads(self, job_uid: str) -> list[dict[str, Any]] | None:
        """Return what Kueue keeps of a job: none where there is no Kueue; None if it cannot be read."""
        path = self.api.path("workloads", group=_KUEUE, version=_KUEUE_VERSION)
        try:
            return self.api.list(path, labelSelector=f"{_JOB_UID_LABEL}={job_uid}")
        except KubernetesError:
            return None

    def unfinished(self, run_uri: str) -> list[dict[str, Any]]:
        """Return the jobs that train below an address and have not ended."""
        jobs = self.api.list(self._path())
        return [job for job in jobs if place_of(job).startswith(f"{run_uri}/") and not self.kind.outcome(job)]

    def _path(self, name: str = "") -> str:
        return self.api.path(self.kind.plural, name, group=self.kind.group, version=self.kind.version)

    def _refused(self, what: str, error: KubernetesError, hint: str = "") -> KubernetesError:
        if not error.status:
            return error
        if error.status == _FORBIDDEN:
            # Quotas and admission webhooks answer with 403 too, and say what is not right.
            hints = {"exceeded quota": "raise that quota, or wait", "denied the request": "make preflight tells more"}
            known = (hint for said, hint in hints.items() if said in error.detail)
            hint = next(known, "make preflight names the missing right")
        return KubernetesError(f"{what}: {error.detail}" + (f" ({hint})" if hint else ""), error.status, error.detail)


def event_time(event: Mapping[str, Any]) -> str:
    """Return when an event was last seen; older and newer reporters fill in different fields."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((str(value) for value in times if value), str(event["metadata"].get("creationTimestamp", "")))

"""PyTorchJobs on a cluster, their pods, events and place in a queue: what a launcher asks of the Kubernetes API.

What a refusal means for training is said here; how calls are made and repeated, kubernetes.py knows.
"""

from collections.abc import Mapping
from typing import Any

from dice_core.launch.failure_report import job_outcome
from dice_core.launch.job_spec import GROUP, JOB_NAME_LABEL, JOB_URI_ANNOTATION, PLURAL, VERSION
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError

_KUEUE, _KUEUE_VERSION, _JOB_UID_LABEL = "kueue.x-k8s.io", "v1beta2", "kueue.x-k8s.io/job-uid"
_NOT_FOUND, _FORBIDDEN = 404, 403


class TrainingJobs:
    """The jobs of the namespace of a connection."""

    def __init__(self, api: KubernetesApi) -> None:
        """Take the connection."""
        self.api = api
        self.namespace = api.namespace

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a job, or None."""
        try:
            return self.api.get(self._path(name))
        except KubernetesError as error:
            raise self._refused(f"may not get pytorchjobs in {self.namespace}", error) from None

    def create(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Create a job; None: there is one of this name already."""
        try:
            return self.api.create(self._path(), body)
        except KubernetesError as error:
            hint = "is the training operator installed? make preflight tells" if error.status == _NOT_FOUND else ""
            raise self._refused(f"the cluster did not take the training job in {self.namespace}", error, hint) from None

    def delete(self, name: str, uid: str) -> bool:
        """Delete this job and its pods; False: it is gone already, or another has its name.

        An empty uid means whichever has the name.
        """
        try:
            return self.api.delete(self._path(name), uid)
        except KubernetesError as error:
            raise self._refused(f"may not delete pytorchjobs in {self.namespace}", error) from None

    def set_owner(self, name: str, uid: str, owner: Mapping[str, Any]) -> bool:
        """Make an object the only owner of this job: with it the job is deleted, and with no other.

        Returns:
            Whether the job is still there.
        """
        return self.api.patch(self._path(name), {"metadata": {"uid": uid, "ownerReferences": [dict(owner)]}})

    def pods(self, name: str) -> list[dict[str, Any]]:
        """Return the pods of a job."""
        try:
            return self.api.list(self.api.path("pods"), labelSelector=f"{JOB_NAME_LABEL}={name}")
        except KubernetesError as error:
            raise self._refused(f"may not list pods in {self.namespace}", error) from None

    def events(self, uid: str) -> list[dict[str, Any]]:
        """Return the events about an object, oldest first."""
        found = self.api.list(self.api.path("events"), fieldSelector=f"involvedObject.uid={uid}")
        return sorted(found, key=event_time)

    def workloads(self, job_uid: str) -> list[dict[str, Any]] | None:
        """Return what Kueue keeps of a job: none where there is no Kueue; None if it cannot be read."""
        path = self.api.path("workloads", group=_KUEUE, version=_KUEUE_VERSION)
        try:
            return self.api.list(path, labelSelector=f"{_JOB_UID_LABEL}={job_uid}")
        except KubernetesError:
            return None

    def unfinished(self, run_uri: str) -> list[dict[str, Any]]:
        """Return the jobs that train below an address and have not ended."""
        return [
            job for job in self.api.list(self._path()) if _place(job).startswith(f"{run_uri}/") and not job_outcome(job)
        ]

    def _path(self, name: str = "") -> str:
        return self.api.path(PLURAL, name, group=GROUP, version=VERSION)

    def _refused(self, what: str, error: KubernetesError, hint: str = "") -> KubernetesError:
        if not error.status:
            return error
        if error.status == _FORBIDDEN:
            # A quota answers with 403 too, and its message says which of its numbers is reached.
            is_quota = "exceeded quota" in error.detail
            hint = "raise that quota, or wait" if is_quota else "make preflight names the missing right"
        return KubernetesError(f"{what}: {error.detail}" + (f" ({hint})" if hint else ""), error.status, error.detail)


def event_time(event: Mapping[str, Any]) -> str:
    """Return when an event was last seen; older and newer reporters fill in different fields."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((str(value) for value in times if value), str(event["metadata"].get("creationTimestamp", "")))


def _place(job: Mapping[str, Any]) -> str:
    return str((job["metadata"].get("annotations") or {}).get(JOB_URI_ANNOTATION, ""))

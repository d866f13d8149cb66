"""The pods of a run, as `make logs` and `make status` show them: which they are, and why one does not run yet."""

from typing import Any

from pipelines.cluster.api import ClusterApi

STAGE_LABEL = "app.kubernetes.io/component"
_RUN_LABEL = "pipeline/runid"


def stage_pods(cluster: ClusterApi, run_id: str, stage: str = "") -> list[dict[str, Any]]:
    """Return the pods of a run that do the work of a stage, oldest first, without KFP's own beside them."""
    return _pods(cluster, f"{_RUN_LABEL}={run_id},{STAGE_LABEL}" + (f"={stage}" if stage else ""))


def waiting_pods(cluster: ClusterApi, run_id: str) -> list[tuple[str, str]]:
    """Return (stage, or a pod's name where it is KFP's own; why it waits) for the pods of a run that do not run yet."""
    return [
        (pod["metadata"]["labels"].get(STAGE_LABEL) or pod["metadata"]["name"], waiting_reason(pod["status"]))
        for pod in _pods(cluster, f"{_RUN_LABEL}={run_id}")
        if pod.get("status", {}).get("phase") == "Pending"
    ]


def waiting_reason(status: dict[str, Any]) -> str:
    """Return why a pod does not run yet, such as `ImagePullBackOff: ...`; empty where it says nothing."""
    # An init container that cannot start keeps the others from saying anything but PodInitializing.
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = container.get("state", {}).get("waiting")
        if waiting:
            return f"{waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
    conditions = [entry for entry in status.get("conditions", ()) if entry.get("status") == "False"]
    return "; ".join(entry["message"] for entry in conditions if entry.get("message"))


def _pods(cluster: ClusterApi, selector: str) -> list[dict[str, Any]]:
    pods = cluster.list(f"/api/v1/namespaces/{cluster.namespace}/pods", labelSelector=selector)
    return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

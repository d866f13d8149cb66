"""The pods of a run, as `make logs` and `make status` show them: which they are, and why one does not run yet."""

from typing import Any

from dice_core.launch.failure_report import why_waiting
from dice_core.launch.kubernetes import KubernetesApi

STAGE_LABEL = "app.kubernetes.io/component"
_RUN_LABEL = "pipeline/runid"


def stage_pods(cluster: KubernetesApi, run_id: str, stage: str = "") -> list[dict[str, Any]]:
    """Return the pods of a run that do the work of a stage, oldest first, without KFP's own beside them."""
    return _pods(cluster, f"{_RUN_LABEL}={run_id},{STAGE_LABEL}" + (f"={stage}" if stage else ""))


def waiting_pods(cluster: KubernetesApi, run_id: str) -> list[tuple[str, str]]:
    """Return (stage, or a pod's name where it is KFP's own; why it waits) for the pods of a run that do not run yet."""
    return [
        (pod["metadata"]["labels"].get(STAGE_LABEL) or pod["metadata"]["name"], why_waiting(pod))
        for pod in _pods(cluster, f"{_RUN_LABEL}={run_id}")
        if pod.get("status", {}).get("phase") == "Pending"
    ]


def _pods(cluster: KubernetesApi, selector: str) -> list[dict[str, Any]]:
    pods = cluster.list(cluster.path("pods"), labelSelector=selector)
    return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

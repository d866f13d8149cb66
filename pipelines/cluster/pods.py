"""The pods of a run: which they are, what task each works at, what it says, why one does not run yet."""

from collections.abc import Mapping
from typing import Any

from dice_core.launch.failure_report import why_waiting
from dice_core.launch.kubernetes import KubernetesApi
from dice_core.stages.table import tasks_of
from pipelines.cluster.log_lines import own_lines
from pipelines.cluster.workflow import KFP_RUN_LABEL, path_of

_NUM_LATE_LINES = 50
STAGE_LABEL = "app.kubernetes.io/component"
_WORKFLOW_LABEL, _NODE_ANNOTATION = "workflows.argoproj.io/workflow", "workflows.argoproj.io/node-name"


def stage_pods(cluster: KubernetesApi, run_id: str, stage: str = "") -> list[dict[str, Any]]:
    """Return the pods of a run that do the work of a stage, oldest first, without KFP's own beside them."""
    wanted = f" in ({','.join(tasks_of(stage))})" if stage else ""
    return _pods(cluster, f"{KFP_RUN_LABEL}={run_id},{STAGE_LABEL}{wanted}")


def waiting_pods(cluster: KubernetesApi, run_id: str) -> list[tuple[str, str]]:
    """Return (stage, or a pod's name where it is KFP's own; why it waits) for the pods of a run that do not run yet."""
    return [
        (pod["metadata"]["labels"].get(STAGE_LABEL) or pod["metadata"]["name"], why_waiting(pod))
        for pod in _pods(cluster, f"{KFP_RUN_LABEL}={run_id}")
        if pod.get("status", {}).get("phase") == "Pending"
    ]


def task_path(pod: Mapping[str, Any]) -> str:
    """Return the path of the task that a pod works at, as the workflow's nodes have it; empty: Argo did not say."""
    metadata = pod["metadata"]
    name = metadata.get("annotations", {}).get(_NODE_ANNOTATION, "")
    return path_of(name, metadata["labels"].get(_WORKFLOW_LABEL, "")).removesuffix(".executor")


def last_line(cluster: KubernetesApi, pod: Mapping[str, Any]) -> str:
    """Return the last line that a pod's stage has written; empty: none of late."""
    path = cluster.path("pods", f"{pod['metadata']['name']}/log")
    lines = list(own_lines(cluster.text(path, container="main", tailLines=str(_NUM_LATE_LINES)).splitlines()))
    return lines[-1].strip() if lines else ""


def _pods(cluster: KubernetesApi, selector: str) -> list[dict[str, Any]]:
    pods = cluster.list(cluster.path("pods"), labelSelector=selector)
    return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

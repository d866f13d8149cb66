"""Why a launcher is told to stop: its run is being stopped, or its pod alone has to go and a next attempt follows.

SIGTERM says neither. A drained node, a preemption and a task's own deadline send it too, and must not cost a training
that runs well. Argo's Workflow, which the launcher's pod belongs to, tells.
"""

from collections.abc import Mapping
from typing import Any

from dice_core.launch.kubernetes import KubernetesApi, KubernetesError, own_pod

# One look, not repeated: an Argo pod is killed about a second after it is told to stop.
_LOOK_SECONDS = 0.5


def why_job_goes_on(api: KubernetesApi, owner: Mapping[str, Any] | None) -> str:
    """Return why the training job outlives a launcher that is told to stop; empty: it is to be deleted.

    Args:
        api: the connection; it is in a hurry from now on.
        owner: what the launcher's pod belongs to, else the pod itself; None: not known, or outside a cluster.
    """
    pod = own_pod()
    if pod is None:
        # A person stops a launcher that no pipeline starts again.
        return ""
    if owner is None:
        return "which run it belongs to is not known"
    api.hurry(_LOOK_SECONDS, give_up=0)
    try:
        if owner["kind"] == "Workflow":
            group, _, version = owner["apiVersion"].partition("/")
            workflow = api.get(api.path("workflows", owner["name"], group=group, version=version))
            return "" if is_being_stopped(workflow, owner["uid"]) else f"run {owner['name']} goes on"
        found = api.get(api.path("pods", pod[0], namespace=pod[1])) or {}
    except KubernetesError as error:
        return f"whether its run is being stopped cannot be read ({error.detail})"
    return "its pod is evicted" if _is_evicted(found) else ""


def is_being_stopped(workflow: Mapping[str, Any] | None, uid: str) -> bool:
    """Return whether a person stops a run: by KFP (a deadline of 0 seconds), by Argo (shutdown), or by deleting it.

    Args:
        workflow: Argo's object, or None where there is none of its name.
        uid: of the run; another of the same name is another run.
    """
    if workflow is None or workflow["metadata"]["uid"] != uid or workflow["metadata"].get("deletionTimestamp"):
        return True
    spec = workflow.get("spec") or {}
    return bool(spec.get("shutdown")) or spec.get("activeDeadlineSeconds") == 0


def _is_evicted(pod: Mapping[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(condition["type"] == "DisruptionTarget" and condition["status"] == "True" for condition in conditions)

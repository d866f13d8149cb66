"""`make logs`: the logs of a run's pods, oldest first, each line with its stage.

Read from the Kubernetes API: Kubeflow Pipelines has no call for them. A pod that was cleaned up has no log there any
more; the UI may still have it, where KFP archives logs.
"""

import argparse
import sys
from typing import Any

from pipelines.cluster_api import ClusterApi, ClusterError
from pipelines.kfp_api import Connection, KfpApi
from pipelines.runs import newest

STAGE_LABEL = "app.kubernetes.io/component"
_RUN_LABEL = "pipeline/runid"


def logs(options: argparse.Namespace) -> int:
    """Show the logs of the newest run of a name."""
    connection = Connection.from_environment(options.host, options.namespace)
    api = KfpApi(connection)
    run = newest(api, options.run)
    cluster = ClusterApi(options.context, connection.namespace)
    pods = stage_pods(cluster, run.run_id, options.task)
    if not pods:
        stage = f" of stage {options.task!r}" if options.task else ""
        raise ClusterError(
            f"run {options.run}: no pod{stage} is left in namespace {connection.namespace}: "
            f"see {api.address('runs', run.run_id)}"
        )
    for pod in pods:
        show(cluster, pod, options.tail)
    return 0


def stage_pods(cluster: ClusterApi, run_id: str, stage: str = "") -> list[dict[str, Any]]:
    """Return the pods of a run that do the work of a stage, oldest first, without KFP's own beside them."""
    selector = f"{_RUN_LABEL}={run_id},{STAGE_LABEL}" + (f"={stage}" if stage else "")
    pods = cluster.list(f"/api/v1/namespaces/{cluster.namespace}/pods", labelSelector=selector)
    return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


def show(cluster: ClusterApi, pod: dict[str, Any], num_lines: int) -> None:
    """Print the end of a pod's log; what keeps a pod from starting where it has none."""
    metadata, status = pod["metadata"], pod.get("status", {})
    stage = metadata["labels"][STAGE_LABEL]
    print(f"== {stage}: {metadata['name']} ({status.get('phase')})", flush=True)
    path = f"/api/v1/namespaces/{cluster.namespace}/pods/{metadata['name']}/log"
    tail = {"tailLines": str(num_lines)} if num_lines else {}
    try:
        text = cluster.text(path, container="main", **tail)
    except ClusterError as error:
        print(f"   no log: {waiting_reason(status) or error}", file=sys.stderr)
        return
    for line in text.splitlines():
        print(f"[{stage}] {line}")


def waiting_reason(status: dict[str, Any]) -> str:
    """Return why a pod does not run yet, such as `ImagePullBackOff: ...`; empty where it says nothing."""
    for container in status.get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting")
        if waiting:
            return f"{waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
    conditions = [entry for entry in status.get("conditions", ()) if entry.get("status") == "False"]
    return "; ".join(entry["message"] for entry in conditions if entry.get("message"))

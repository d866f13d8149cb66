"""`make logs`: the logs of a run's pods, oldest first, each line with its stage.

Read from the Kubernetes API: Kubeflow Pipelines has no call for them. A pod that was cleaned up has no log there any
more; the UI may still have it, where KFP archives logs.
"""

import argparse
import sys
from typing import Any

from pipelines.cluster.api import ClusterApi, ClusterError
from pipelines.cluster.pods import STAGE_LABEL, stage_pods, waiting_reason
from pipelines.kfp.api import Connection, KfpApi
from pipelines.kfp.runs import newest


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

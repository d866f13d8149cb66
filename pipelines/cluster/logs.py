"""`make logs`: the logs of a run's pods, oldest first, each line with its stage.

Read from the Kubernetes API: Kubeflow Pipelines has no call for them. A pod that was cleaned up has no log there any
more; the UI may still have it, where KFP archives logs.
"""

import argparse
import sys
from typing import Any

from dice_core.launch.failure_report import why_waiting
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from pipelines.cluster.pods import STAGE_LABEL, stage_pods
from pipelines.kfp.api import Connection, KfpApi
from pipelines.kfp.runs import newest


def logs(options: argparse.Namespace) -> int:
    """Show the logs of the newest run of a name."""
    connection = Connection.from_environment(options.host, options.namespace)
    api = KfpApi(connection)
    run = newest(api, options.run)
    cluster = KubernetesApi(connection.namespace, context=options.context)
    pods = stage_pods(cluster, run.run_id, options.task)
    if not pods:
        stage = f" of stage {options.task!r}" if options.task else ""
        raise KubernetesError(
            f"run {options.run}: no pod{stage} is left in namespace {connection.namespace}: "
            f"see {api.address('runs', run.run_id)}"
        )
    for pod in pods:
        show(cluster, pod, options.tail)
    return 0


def show(cluster: KubernetesApi, pod: dict[str, Any], num_lines: int) -> None:
    """Print the end of a pod's log; what keeps a pod from starting where it has none."""
    metadata, status = pod["metadata"], pod.get("status", {})
    stage = metadata["labels"][STAGE_LABEL]
    print(f"== {stage}: {metadata['name']} ({status.get('phase')})", flush=True)
    path = cluster.path("pods", f"{metadata['name']}/log")
    tail = {"tailLines": str(num_lines)} if num_lines else {}
    try:
        text = cluster.text(path, container="main", **tail)
    except KubernetesError as error:
        print(f"   no log: {why_waiting(pod) or error}", file=sys.stderr)
        return
    for line in text.splitlines():
        print(f"[{stage}] {line}")

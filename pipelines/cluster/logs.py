"""`make logs`: the logs of a run's pods, oldest first, each line with its stage.

Read from the Kubernetes API: Kubeflow Pipelines has no call for them. A pod that was deleted with its workflow has no
log there any more; the UI may still have it, where KFP archives logs. log_lines.py knows which lines are the stage's.
"""

import argparse
import sys
from typing import Any

from dice_core.launch.failure_report import why_waiting
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.settings.base import ConfigError
from dice_core.settings.hints import allowed
from dice_core.stages.table import STAGES
from pipelines.cluster.log_lines import own_lines
from pipelines.cluster.pods import STAGE_LABEL, stage_pods
from pipelines.kfp.api import Connection, KfpApi
from pipelines.kfp.names import shown_name
from pipelines.kfp.runs import newest


def logs(options: argparse.Namespace) -> int:
    """Show the logs of the newest run of a name.

    Raises:
        ConfigError: no run is named, or there is no such stage: nobody need be asked for that.
    """
    if not options.run:
        raise ConfigError("run: RUN= is needed, the name of a run; make status lists them")
    if options.task and options.task not in STAGES:
        raise ConfigError(f"task: unknown stage {options.task!r}, {allowed(options.task, STAGES)}")
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
    if run.recurring_run_id:
        print(f"run {shown_name(api, run)}")
    for pod in pods:
        show(cluster, pod, options.tail, is_raw=options.raw)
    return 0


def show(cluster: KubernetesApi, pod: dict[str, Any], num_lines: int, *, is_raw: bool = False) -> None:
    """Print the end of a pod's log, or what keeps the pod from starting.

    Args:
        cluster: where it runs.
        pod: as the API has it.
        num_lines: that are shown at most; 0: all.
        is_raw: with the lines of KFP and Argo.
    """
    metadata, status = pod["metadata"], pod.get("status", {})
    stage = metadata["labels"][STAGE_LABEL]
    print(f"== {stage}: {metadata['name']} ({status.get('phase')})", flush=True)
    path = cluster.path("pods", f"{metadata['name']}/log")
    # Nobody knows how many of the last lines are the stage's. A node keeps 10 MiB of a log by default.
    tail = {"tailLines": str(num_lines)} if num_lines and is_raw else {}
    try:
        text = cluster.text(path, container="main", **tail)
    except KubernetesError as error:
        print(f"   no log: {why_waiting(pod) or error}", file=sys.stderr)
        return
    lines = text.splitlines() if is_raw else list(own_lines(text.splitlines()))
    for line in lines[-num_lines:]:
        print(f"[{stage}] {line}")

"""`make cancel`: stop a run, and delete what it would leave on the cluster: training, pods that never started."""

import argparse
import shlex
import sys
from typing import Any

from pipelines.cluster.jobs import delete_pods_not_started, stop_training
from pipelines.kfp.api import Connection, KfpApi, KfpError
from pipelines.kfp.runs import newest
from pipelines.kfp.task_states import run_facts


def cancel(options: argparse.Namespace) -> int:
    """Stop the newest run of a name; what it has finished stays, and retry continues it."""
    connection = Connection.from_environment(options.host, options.namespace)
    api = KfpApi(connection)
    run = newest(api, options.run)
    return int(not stop(api, run, options.run, options.context, connection.namespace))


def stop(api: KfpApi, run: Any, name: str, context: str, namespace: str) -> bool:
    """Stop a run, its training, and its pods that never started; print what became of each.

    What KFP answers does not keep the rest from being stopped: GPUs are held by pods.

    Args:
        api: of the run.
        run: of KFP.
        name: what the person calls it.
        context: of the kubeconfig; empty: the current one.
        namespace: of the run.

    Returns:
        Whether KFP has stopped it, or had before.
    """
    is_stopped = _terminate(api, run, name)
    if run.state != "SUCCEEDED":
        # Of a run that has ended too: one that was terminated in the UI may have left its job.
        stop_training(context, namespace, api.run(run.run_id))
        delete_pods_not_started(context, namespace, run)
    return is_stopped


def _terminate(api: KfpApi, run: Any, name: str) -> bool:
    if run_facts(run).is_final:
        print(f"run {name}: is {run.state} already")
        return True
    try:
        is_first = run.state != "CANCELING" and api.terminate(run.run_id)
    except KfpError as error:
        print(f"pipelines: {error}", file=sys.stderr)
        return False
    stopped = "is being stopped" if is_first else "is being stopped already"
    print(f"run {name}: {stopped}; make retry RUN={shlex.quote(name)} continues it")
    return True

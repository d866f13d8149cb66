"""`make cancel`: stops a run and its training."""

import argparse
import shlex

from pipelines.cluster.jobs import stop_training
from pipelines.kfp.api import Connection, KfpApi
from pipelines.kfp.runs import FINAL, newest


def cancel(options: argparse.Namespace) -> int:
    """Stop the newest run of a name and its training; what it has finished stays, and retry continues it."""
    connection = Connection.from_environment(options.host, options.namespace)
    api = KfpApi(connection)
    run = newest(api, options.run)
    if run.state in FINAL:
        print(f"run {options.run}: is {run.state} already")
    else:
        api.terminate(run.run_id)
        print(f"run {options.run}: is being stopped; make retry RUN={shlex.quote(options.run)} continues it")
    if run.state != "SUCCEEDED":
        # Of a run that has ended too: one that was terminated in the UI may have left its job.
        stop_training(options.context, connection.namespace, api.run(run.run_id))
    return 0

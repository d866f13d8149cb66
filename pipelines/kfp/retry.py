"""`make retry`: continue a run that has ended, with its own pipeline and parameters, of a recurring run too.

KFP's own retry starts at what failed. It needs the run's whole workflow in one object of the Kubernetes API: where that
has gone, or is too large for etcd, the same pipeline version is started anew under the run's name, and each stage that
has finished returns at once.
"""

import argparse
import shlex
from typing import Any

from pipelines.cluster.config import PIPELINE_ACCOUNT
from pipelines.cluster.jobs import own_name, parameters_of
from pipelines.kfp.api import Connection, KfpApi, KfpError
from pipelines.kfp.follow import Pace, follow
from pipelines.kfp.run_view import LOST, Observer
from pipelines.kfp.runs import newest

_NEEDS_NEW_START = ("too large", "exceeds the limit", "exceeded the limit", "not found")
"""What KFP says where its own retry can never succeed: the workflow does not fit into etcd, or has gone."""


def retry(options: argparse.Namespace, pace: Pace | None = None) -> int:
    """Continue the newest run of a name; follow it with --wait.

    Raises:
        KfpError: there is no such run, it is under way, or it has succeeded.
    """
    connection = Connection.from_environment(options.host, options.namespace)
    api, name = KfpApi(connection), options.run
    observer = Observer(api, connection.namespace, options.context, newest(api, name).run_id)
    view = observer.look()
    if view.state in ("SUCCEEDED", "SKIPPED"):
        raise KfpError(f"run {name!r} has {view.state}: there is nothing to retry")
    if view.state == "CANCELING":
        raise KfpError(
            f"run {name!r} is being stopped: make retry when it has ended (make status RUN={shlex.quote(name)})"
        )
    if not view.is_over:
        raise KfpError(
            f"run {name!r} is {view.state}: wait for its end (make status RUN={shlex.quote(name)}), or make cancel it "
            "first"
        )
    run_id = (
        _start_anew(api, view.run, name, "its workflow has gone") if view.state == LOST else _retry(api, view, name)
    )
    observer = Observer(api, connection.namespace, options.context, run_id)
    return follow(observer, name, pace) if options.wait else 0


def _retry(api: KfpApi, view: Any, name: str) -> str:
    """Let KFP retry a run, or start it anew where KFP cannot; return the id of what runs then."""
    try:
        api.retry(view.run.run_id)
    except KfpError as error:
        if not any(words in str(error) for words in _NEEDS_NEW_START):
            raise
        return _start_anew(api, view.run, name, f"KFP cannot retry it ({error})")
    print(f"run {name}: goes on where it failed, {api.address('runs', view.run.run_id)}")
    return str(view.run.run_id)


def _start_anew(api: KfpApi, run: Any, name: str, why: str) -> str:
    """Start a run's own pipeline version with its own parameters under its name; return the id of the new one.

    Raises:
        KfpError: KFP does not know which version it was.
    """
    version = run.pipeline_version_reference
    if not version or not version.pipeline_version_id:
        raise KfpError(
            f"run {name!r}: {why}, and KFP does not know its pipeline version: make submit RUN= continues it"
        )
    own = own_name(run) or str(run.display_name)
    # A recurring run that begins under its own whole name takes what it chose before.
    parameters = {**parameters_of(run), **({"run": own} if own_name(run) else {})}
    started = api.start_run(str(run.experiment_id), own, parameters, version, run.service_account or PIPELINE_ACCOUNT)
    print(
        f"run {name}: {why}, so it is started anew as {own}, with its own pipeline and settings; what it has finished "
        f"is taken as it is, {api.address('runs', started.run_id)}"
    )
    return str(started.run_id)

"""`make status`: a run and its tasks, or the latest runs."""

import argparse
import shlex
from datetime import UTC

from pipelines.kfp.api import Connection, KfpApi
from pipelines.kfp.names import shown_name
from pipelines.kfp.run_view import LOST, Observer, RunView, exit_code
from pipelines.kfp.runs import newest
from pipelines.kfp.task_states import run_facts

_SHOWN_RUNS = 10


def status(options: argparse.Namespace) -> int:
    """Show the newest run of a name with its tasks, or without a name the latest runs; 1 if the run did not succeed."""
    connection = Connection.from_environment(options.host, options.namespace)
    api = KfpApi(connection)
    if not options.run:
        _show_latest(api)
        return 0
    found = newest(api, options.run)
    observer = Observer(api, connection.namespace, options.context, found.run_id)
    view = observer.look()
    print(f"run {shown_name(api, view.run)}: {in_words(view, options.run)}, {api.address('runs', found.run_id)}")
    for task in view.tasks:
        print(f"  {task}")
    if view.sources and view.tasks:
        print(f"  states are from {' and '.join(view.sources)}; ? is not known")
    if not view.is_over:
        for name, reason in observer.waiting():
            print(f"  {name} does not run yet: {reason or 'no reason given'}")
    return exit_code(view)


def _show_latest(api: KfpApi) -> None:
    runs = api.runs()[:_SHOWN_RUNS]
    if not runs:
        print(f"no runs at {api.host}: make submit starts one")
        return
    print(f"{'RUN':<40} {'STATE':<10} STARTED (UTC)")
    for run in runs:
        print(f"{shown_name(api, run):<40} {run_facts(run).label:<10} {run.created_at.astimezone(UTC):%Y-%m-%d %H:%M}")


def in_words(view: RunView, name: str) -> str:
    """Return the state of a run for people, with what to do where nothing more happens by itself."""
    if view.state == LOST:
        return (
            f"lost: its workflow has gone (deleted with its schedule, or by hand), and KFP takes it for "
            f"{view.facts.state}; what it has finished stays: make retry RUN={shlex.quote(name)} continues it"
        )
    if view.state != view.facts.state:
        return f"{view.state} (KFP calls it {view.facts.state})"
    reason = view.run.error.message if view.run.error and view.run.error.message else ""
    return f"{view.state}: {reason}" if reason else view.state

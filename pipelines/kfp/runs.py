"""Which run a name means: KFP's newest of that name, or the run that keeps its results under it."""

from typing import Any

from dice_core.settings.hints import nearest
from dice_core.stages import recurring_name as recurring
from pipelines.cluster.jobs import own_name
from pipelines.kfp.api import KfpApi, KfpError


def newest(api: KfpApi, name: str) -> Any:
    """Return the newest run of a name, as runs_of has them.

    Raises:
        KfpError: there is none, or the name is empty, which would be a run of anybody.
    """
    runs = runs_of(api, name) if name else []
    if not runs:
        names = list(dict.fromkeys(run.display_name for run in api.runs()))
        fault = f"there is none called {name!r}" if name else "RUN= is needed, the name of a run"
        meant = f", did you mean {like[0]!r}?" if name and (like := nearest(name, names)) else ";"
        raise KfpError(f"run: {fault}{meant} the latest are: {', '.join(names[:5]) or 'none'}")
    return runs[0]


def runs_of(api: KfpApi, name: str) -> list[Any]:
    """Return the runs of a name, the newest first: KFP's, or the run of that place in S3."""
    return api.runs(name) or _run_of_place(api, name)


def _run_of_place(api: KfpApi, name: str) -> list[Any]:
    """Return the run that keeps its results under a name which it was not given, if there is one."""
    # Nothing in a list of runs says it: only a name of that form is worth going through all of them.
    if not recurring.is_run_name(name):
        return []
    for found in api.all_runs():
        # A part of the run's id ends the name; only what fits is read whole, with its parameters.
        if name.endswith(recurring.run_name("x", found.run_id)[1:]) and own_name(run := api.run(found.run_id)) == name:
            return [run]
    return []

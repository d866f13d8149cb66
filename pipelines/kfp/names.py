"""What a run is called for people: by our own name, and beside it by KFP's where they differ.

KFP makes up the name of a recurring run, such as `soonj7fkn-1-1032575986`. Its folder in S3 has ours, `soon-4ac25117`.
"""

from typing import Any

from pipelines.cluster.jobs import own_name
from pipelines.kfp.api import KfpApi


def shown_name(api: KfpApi, run: Any) -> str:
    """Return the name of a run as the commands show it; RUN= takes either part of it.

    Args:
        api: asked for the run's parameters where a list of runs left them out.
        run: of KFP, with or without its parameters.
    """
    if not run.recurring_run_id:
        return str(run.display_name)
    name = own_name(run) or own_name(api.run(run.run_id))
    return f"{name} ({run.display_name})" if name else str(run.display_name)


def short_name(api: KfpApi, run: Any) -> str:
    """Return the one word for a run that RUN= takes: our own name, or KFP's where it is of another pipeline."""
    return own_name(run) or own_name(api.run(run.run_id)) or str(run.display_name)

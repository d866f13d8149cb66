"""What a run is called for people: by our own name, and beside it by KFP's where they differ.

KFP makes up the name of a recurring run, such as `soonj7fkn-1-1032575986`. Its folder in S3 has ours, `soon-4ac25117`.
A run that was started in KFP's UI may have any name there.
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
    name = short_name(api, run)
    return name if name == run.display_name else f"{name} ({run.display_name})"


def short_name(api: KfpApi, run: Any) -> str:
    """Return the one word for a run that RUN= takes: our own name, or KFP's where it is of another pipeline."""
    return own_name(run) or own_name(api.run(run.run_id)) or str(run.display_name)

"""What a run is called that nobody has named: a prefix and a part of the id that Kubeflow Pipelines gave the run.

The prefix is the schedule's name, or the promoted pointer of a run that was started by hand without a name.

Loads nothing but layout.
"""

import os
import re

from dice_core.storage import layout
from dice_core.storage.address import open_storage

CHOSEN = "inputs.json"
"""What a recurring run has chosen, at the place of choose-inputs."""
_JOB_CHARACTERS = 8
_PLACEHOLDER = "{{"
_RUN_ID_VARIABLE = "KFP_RUN_ID"


def run_name(name: str, job_id: str) -> str:
    """Return the name of the run with that job id.

    Raises:
        ValueError: no job id is known, or the name is too long.
    """
    if _PLACEHOLDER in job_id:
        # Backends that do not fill the placeholder in still label the pod, and the pod reads its label.
        job_id = os.environ.get(_RUN_ID_VARIABLE, "")
    characters = "".join(character for character in job_id.lower() if character.isalnum())[:_JOB_CHARACTERS]
    if not characters:
        raise ValueError(f"{name}: the id of this run is not known: {_RUN_ID_VARIABLE} must hold it, got {job_id!r}")
    return layout.check_name(f"{name}-{characters}", "run")


def given_or_new(run: str, promote_as: str, job_id: str) -> str:
    """Return the name of a run that was started by hand: the given one, or a fresh one.

    Args:
        run: the given name; empty: none.
        promote_as: the promoted pointer, with which a fresh name begins; may be empty.
        job_id: unique to the run; KFP's retry keeps it.

    Raises:
        ValueError: no job id is known where the name follows from it.
    """
    longest = layout.MAX_NAME - _JOB_CHARACTERS - 1
    return run or run_name(promote_as[:longest] or "run", job_id)


def is_run_name(name: str) -> bool:
    """Return whether a name ends as those of run_name do; that of a run by hand may too."""
    return re.search(rf"-[0-9a-z]{{{_JOB_CHARACTERS}}}$", name) is not None


def continued_or_new(root: str, name: str, job_id: str) -> str:
    """Return the name of the run with that job id, or the name itself where it is a recurring run's that has begun.

    `make retry` starts a run anew that KFP cannot retry: it then has another id.

    Raises:
        ValueError: as run_name.
        StorageError: the storage cannot be read.
    """
    if is_run_name(name):
        place = layout.choose_inputs(layout.run(root, name))
        if any(found.key == CHOSEN for found in open_storage(place).list(CHOSEN)):
            return name
    return run_name(name, job_id)

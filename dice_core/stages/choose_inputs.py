"""What a recurring run works on: the last promoted policy, the newest prompts, and a name of its own.

Decided once, when the run starts, and handed to its stages as plain addresses: a retried stage sees the same.
"""

import os
import re
from dataclasses import dataclass

from dice_core.data.source_files import is_hidden
from dice_core.progress import log
from dice_core.stages.attempts import attempt
from dice_core.stages.table import CHOOSE_INPUTS
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import require_manifest
from dice_core.storage.promotion import Promotion, read_promotion

_JOB_CHARACTERS = 8
_PLACEHOLDER = "{{"
_RUN_ID_VARIABLE = "KFP_RUN_ID"


@dataclass(frozen=True)
class Inputs:
    """Name of a run, and where its inputs are."""

    run: str
    policy_source: str
    reference_source: str
    prompts_source: str


def choose_inputs(
    root: str,
    name: str,
    job_id: str,
    *,
    promote_as: str,
    policy_source: str,
    reference_source: str,
    prompts_source: str,
) -> Inputs:
    """Choose the inputs of a run.

    Args:
        root: where all runs keep their data.
        name: what the names of the recurring runs begin with.
        job_id: unique to the run; the same again gives the same name.
        promote_as: name of the promoted pointer; empty: always start from the sources given.
        policy_source: to start from while nothing is promoted.
        reference_source: of that policy; empty: there must be a promoted policy.
        prompts_source: see newest_prompts.

    Raises:
        StorageError: nothing is promoted and there is no reference, the promoted policy is gone or changed, or no
            prompts are there.
    """
    run = run_name(name, job_id)
    with attempt(CHOOSE_INPUTS, layout.choose_inputs(layout.run(root, run))):
        policy_source, reference_source = _choose_policy(root, promote_as, policy_source, reference_source)
        chosen = Inputs(run, policy_source, reference_source, newest_prompts(prompts_source))
    log(f"run {run}: policy {chosen.policy_source}, reference {chosen.reference_source}")
    log(f"run {run}: prompts {chosen.prompts_source or 'of the preference pairs'}")
    return chosen


def _choose_policy(root: str, promote_as: str, policy_source: str, reference_source: str) -> tuple[str, str]:
    """Return the promoted policy and its reference, or, while nothing is promoted, those given."""
    promotion = read_promotion(layout.promoted(root, promote_as)) if promote_as else None
    if promotion:
        return _check(promotion, layout.promoted(root, promote_as))
    if not reference_source:
        raise UnfitError(
            f"{layout.promoted(root, promote_as) if promote_as else root}: no policy is promoted yet, and the preset "
            "names no reference to start with: make submit once, so that a policy passes its gate"
        )
    return policy_source, reference_source


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


def is_run_name(name: str) -> bool:
    """Return whether a name ends as those of run_name do; that of a run by hand may too."""
    return re.search(rf"-[0-9a-z]{{{_JOB_CHARACTERS}}}$", name) is not None


def newest_prompts(source: str) -> str:
    """Return the last file or folder, by name, below a prefix that ends in "/"; any other source is taken as it is.

    By name and not by time, so that a file that is copied again does not become the newest: name them by date. Names
    that begin with "_" or "." are not data.

    Raises:
        StorageError: there is none.
    """
    if not source.endswith("/"):
        return source
    names = {found.key.partition("/")[0] for found in open_storage(source).list()}
    names = {name for name in names if not is_hidden(name)}
    if not names:
        raise UnfitError(f"{source}: no prompts are there: put a JSONL or Parquet file below it, named by date")
    return layout.join(source, max(names))


def _check(promotion: Promotion, uri: str) -> tuple[str, str]:
    found = require_manifest(promotion.policy_uri).content_digest
    if found != promotion.content_digest:
        raise UnfitError(
            f"{promotion.policy_uri}: not the policy that was promoted (content {found[:12]}, {uri} says "
            f"{promotion.content_digest[:12]}): promote again by make submit, or delete {uri}"
        )
    if not promotion.reference_uri:
        raise UnfitError(f"{uri}: written by version {promotion.package_version}, it names no reference: delete it")
    return promotion.policy_uri, promotion.reference_uri

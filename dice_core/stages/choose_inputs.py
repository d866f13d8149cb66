"""What a recurring run works on: the last promoted policy, the newest prompts, and a name of its own.

Decided once, when the run starts, written down at the run, and handed to its stages as plain addresses: a retried stage
sees the same, and so does a run that is started anew under its name.
"""

import json
from dataclasses import asdict, astuple, dataclass
from typing import Any

from dice_core.data.source_files import is_hidden
from dice_core.progress import log
from dice_core.stages.attempts import attempt
from dice_core.stages.recurring_name import CHOSEN, continued_or_new
from dice_core.stages.table import CHOOSE_INPUTS
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import MissingObjectError, UnfitError
from dice_core.storage.promotion import Promotion, read_promotion, require_content
from dice_core.storage.stored_record import read_record


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
    """Choose the inputs of a run, or return what it has chosen before.

    Args:
        root: where all runs keep their data.
        name: what the names of the recurring runs begin with; the whole name of one continues that run.
        job_id: unique to the run; the same again gives the same name.
        promote_as: name of the promoted pointer; empty: always start from the sources given.
        policy_source: to start from while nothing is promoted.
        reference_source: of that policy; empty: there must be a promoted policy.
        prompts_source: see newest_prompts.

    Raises:
        StorageError: nothing is promoted and there is no reference, the promoted policy is gone or changed, or no
            prompts are there.
    """
    run = continued_or_new(root, name, job_id)
    place = layout.choose_inputs(layout.run(root, run))
    with attempt(CHOOSE_INPUTS, place):
        chosen = _chosen_before(place)
        if chosen is None:
            policy_source, reference_source = _choose_policy(root, promote_as, policy_source, reference_source)
            chosen = Inputs(run, policy_source, reference_source, newest_prompts(prompts_source))
            open_storage(place).write_bytes(CHOSEN, json.dumps(asdict(chosen), indent=1).encode())
    log(f"run {run}: policy {chosen.policy_source}, reference {chosen.reference_source}")
    log(f"run {run}: prompts {chosen.prompts_source or 'of the preference pairs'}")
    return chosen


def _chosen_before(place: str) -> Inputs | None:
    try:
        return read_record(Inputs, open_storage(place).read_bytes(CHOSEN), layout.join(place, CHOSEN))
    except MissingObjectError:
        return None


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
    require_content(promotion.policy_uri, promotion.content_digest, uri)
    if not promotion.reference_uri:
        raise UnfitError(
            f"{uri}: written by version {promotion.package_version}, it names no reference of {promotion.policy_uri}: "
            "delete it, then dice promote with --policy and --reference"
        )
    return promotion.policy_uri, promotion.reference_uri


def choose_inputs_task(**given: Any) -> tuple[str, str, str, str]:
    """Choose the inputs of a recurring run, as a task of a pipeline; see choose_inputs for what is given.

    Returns:
        The run's name, its policy, its reference and its prompts.
    """
    return astuple(choose_inputs(**given))

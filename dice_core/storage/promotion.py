"""The pointer to the last policy that passed its gate: what a recurring run starts from and what people deploy.

Changed by a conditional write, so that of two runs that end at once one sees the other's policy.
"""

import json
from dataclasses import asdict, dataclass

from dice_core import __version__
from dice_core.progress import log
from dice_core.storage.address import open_storage
from dice_core.storage.contract import Storage, StorageError
from dice_core.storage.probe import require_writable
from dice_core.storage.stored_record import read_record


@dataclass(frozen=True)
class Promotion:
    """A promoted policy: where it is, what it is, and who said so."""

    policy_uri: str
    content_digest: str
    evaluated: str
    """The evaluate stage that accepted it."""
    iteration: int
    replaces: str = ""
    """URI of the policy that was promoted before."""
    reference_uri: str = ""
    """What the policy was trained from: the reference of its implicit reward, for a run that starts from it."""
    package_version: str = __version__


def read_promotion(uri: str) -> Promotion | None:
    """Return what the pointer says, or None where nothing was promoted yet.

    Raises:
        StorageError: what is there is not a promotion.
    """
    storage, name = _place(uri)
    found = storage.read_versioned(name)
    return None if found is None else _parse(found[0], uri)


def require_promotable(uri: str) -> None:
    """Check that a pointer can be moved, before the work that decides whether it is.

    Raises:
        StorageError: what is there is not a promotion, or nothing can be written beside it.
    """
    read_promotion(uri)
    require_writable(_place(uri)[0].uri)


def promote(
    uri: str, policy_uri: str, content_digest: str, *, evaluated: str, iteration: int, reference_uri: str = ""
) -> Promotion:
    """Point to a policy.

    Raises:
        ConflictError: another run promoted at the same moment; running the stage again decides anew.
    """
    storage, name = _place(uri)
    found = storage.read_versioned(name)
    before = _parse(found[0], uri) if found else None
    if before and before.content_digest == content_digest:
        return before
    replaces = before.policy_uri if before else ""
    promotion = Promotion(policy_uri, content_digest, evaluated, iteration, replaces, reference_uri)
    storage.write_if_version(name, json.dumps(asdict(promotion), indent=1).encode(), found[1] if found else None)
    log(f"promoted: {uri} now points to {policy_uri}")
    return promotion


def _place(uri: str) -> tuple[Storage, str]:
    parent, _, name = uri.rpartition("/")
    return open_storage(parent or "."), name


def _parse(data: bytes, uri: str) -> Promotion:
    try:
        return read_record(Promotion, data, uri)
    except ValueError as error:
        raise StorageError(f"{uri}: not a pointer to a promoted policy: {error}") from None

"""A tiny write before long work: a place that cannot be written is found before the work and not after it."""

from dice_core.progress import log
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError

# One name: where nothing may be deleted, the probes of all attempts leave one empty file.
_PROBE = ".probe"


def require_writable(uri: str) -> None:
    """Check that files can be written at a place, and leave none there.

    Raises:
        StorageError: they cannot.
    """
    storage = open_storage(uri)
    storage.write_bytes(_PROBE, b"")
    try:
        storage.delete(_PROBE)
    except StorageError as error:
        # A stage writes and deletes nothing.
        log(f"storage: an empty {_PROBE} stays at {uri}: {error}")

"""Where files on their way lie on this machine."""

import os
from pathlib import Path

from dice_core.storage.contract import StorageError


def scratch_root() -> str | None:
    """Return the folder DICE_SCRATCH, which is made if it is not there; None: the system's own for temporary files.

    Raises:
        StorageError: it cannot be made.
    """
    root = os.environ.get("DICE_SCRATCH")
    if not root:
        return None
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"DICE_SCRATCH: {root} cannot be made ({error.strerror}): name a folder where user {os.geteuid()} may write"
        ) from None
    return root

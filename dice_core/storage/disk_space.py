"""The disks of this machine that files are brought to: which one is full, what is needed, and what to set."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dice_core.storage.contract import StorageError

IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_GIB = 1024**3


def require_space(folder: Path, num_bytes: int) -> None:
    """Check that a folder's disk has room.

    Raises:
        StorageError: it has not; nothing has been written then.
    """
    if num_bytes > _num_free(folder):
        raise _full(folder, num_bytes)


@contextmanager
def full_disk_is_named(folder: Path) -> Iterator[None]:
    """Turn the error of a disk that fills up while a folder is written into one line that names the folder."""
    try:
        yield
    except OSError as error:
        is_elsewhere = error.filename and not Path(str(error.filename2 or error.filename)).is_relative_to(folder)
        if error.errno not in IS_FULL or is_elsewhere:
            raise
        raise _full(folder) from None


def _full(folder: Path, num_bytes: int = 0) -> StorageError:
    needed = f"{num_bytes / _GIB:.2f} GiB are needed, " if num_bytes else ""
    return StorageError(
        f"{folder}: its disk is full ({needed}{_num_free(folder) / _GIB:.2f} GiB are free): free some space, or set "
        "DICE_CACHE (models) or DICE_SCRATCH (all other files on their way) to a folder on another disk"
    )


def _num_free(folder: Path) -> int:
    """Return the bytes that this user may still write to the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free

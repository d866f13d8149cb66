"""Which files below a folder, or below a prefix on S3, hold the user's rows: those that are read, and that identify it.

As Spark and Arrow have it, names that begin with "." or "_" are not data, at any depth. Opens no file; sources.py does.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dice_core.data.records import RecordError

_READ = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")
_DATA = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".avro", ".orc"}
_DATA |= {".gz", ".zst", ".bz2", ".xz", ".zip"}
_NUM_SHOWN = 5


def is_hidden(name: str) -> bool:
    """Return whether a file or a folder of that name is not data, such as `_SUCCESS` or the `._a.jsonl` of a Mac."""
    return name.startswith((".", "_"))


def files_to_read(names: Iterable[str], shown: str) -> list[str]:
    """Choose the files with rows; others, such as a README, are left out.

    Args:
        names: of all files, relative to the folder or prefix, with "/" between their parts.
        shown: what messages call the folder or prefix.

    Returns:
        Names in their order.

    Raises:
        RecordError: there is none, or a file seems to hold data in a form that is not read.
    """
    names = sorted(name for name in names if not any(map(is_hidden, name.split("/"))))
    chosen = [name for name in names if name.lower().endswith(_READ)]
    unread = [name for name in names if not name.lower().endswith(_READ) and _seems_data(name)]
    if unread:
        more = f" and {len(unread) - _NUM_SHOWN} more" if len(unread) > _NUM_SHOWN else ""
        raise RecordError(
            f"{shown}: has data that would not be read: {', '.join(unread[:_NUM_SHOWN])}{more}; rows are read from "
            "*.jsonl and *.ndjson (each also with .gz) and *.parquet: convert these, move them elsewhere, or begin "
            "their names with '_'"
        )
    if not chosen:
        raise RecordError(f"{shown}: the folder has no *.jsonl and no *.parquet file")
    return chosen


def _seems_data(name: str) -> bool:
    return not _DATA.isdisjoint(PurePosixPath(name.lower()).suffixes)


def files_below(folder: Path, shown: str) -> list[str]:
    """Choose the files with rows below a folder of this machine, as files_to_read does; links are followed."""
    names = []
    try:
        for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
            folders[:] = [name for name in folders if not is_hidden(name)]
            names += [Path(parent, name).relative_to(folder).as_posix() for name in files]
    except OSError as error:
        raise RecordError(f"{shown}: cannot be read: {error.strerror} ({error.filename})") from None
    return files_to_read(names, shown)


def _raise(error: OSError) -> None:
    raise error

"""What a storage promises: files under keys, errors of one line. folder.py and s3.py keep it; address.py picks one.

Knows keys and bytes. layout.py names the keys, and manifest.py says whether a file is finished and whole.
"""

import errno
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from dice_core.storage import layout


class StorageError(RuntimeError):
    """Storage that cannot be used as asked. The message is one line: the URI, the cause, what to do."""


class UnfitError(StorageError):
    """What lies at a place is not what was asked for. Another try finds the same: a person has to change something."""


class MissingObjectError(UnfitError):
    """No object at that key."""


class NoAccessError(StorageError):
    """This process has no credentials, or ones without the right."""


class ConflictError(StorageError):
    """A conditional write lost: somebody else wrote the object first."""


@dataclass(frozen=True)
class StoredObject:
    """One stored file: its key relative to the storage's URI, its bytes."""

    key: str
    size: int


class Storage(Protocol):
    """A place that holds files under keys relative to its URI.

    Safe to use from several threads. Every method raises StorageError, with one line, when the place cannot be used.
    A prefix is the beginning of a key: end it with "/" to mean a folder ("a/1" also covers "a/10").
    """

    uri: str

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Return the objects below the prefix, in order of their keys; none is no error."""
        ...

    def read_bytes(self, key: str) -> bytes:
        """Return a small object whole.

        Raises:
            MissingObjectError: there is none.
        """
        ...

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write a small object at once: readers see the old one or the new one."""
        ...

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        """Return a small object and its version, or None where there is none."""
        ...

    def write_if_version(self, key: str, data: bytes, version: str | None) -> None:
        """Write a small object only if it still is the version that was read; None: only if there is none.

        Raises:
            ConflictError: it is not. Read again: after a network fault, the writer that won may be this one.
        """
        ...

    def upload(self, path: Path, key: str) -> None:
        """Copy a file of any size into the storage; it appears there only when complete."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Copy an object of any size to a file, under a temporary name until complete.

        Raises:
            MissingObjectError: there is none.
        """
        ...

    def delete(self, prefix: str) -> int:
        """Delete the objects below the prefix, manifests first, and return how many there were."""
        ...

    def delete_unfinished(self, min_age_seconds: float) -> int:
        """Delete what killed uploads left below the URI, which nobody sees but is paid for; return how many.

        Args:
            min_age_seconds: younger ones may still be under way.
        """
        ...


def check_key(uri: str, key: str) -> str:
    """Return the key if it stays below the storage's URI on every backend.

    Raises:
        StorageError: it is empty, absolute, or climbs out.
    """
    if not key or key.startswith("/") or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"{uri}: not a key: {key!r}; allowed: names joined by '/', without '.' and '..'")
    return key


def check_prefix(uri: str, prefix: str) -> str:
    """Return the prefix if it stays below the storage's URI; it may be empty, and may end in "/".

    Raises:
        StorageError: it is absolute or climbs out.
    """
    return prefix and check_key(uri, prefix.removesuffix("/")) and prefix


def manifests_first(keys: list[str]) -> list[str]:
    """Return the keys in the order to delete them: what is no longer vouched for is never trusted half deleted."""
    return sorted(keys, key=lambda key: (PurePosixPath(key).name != layout.MANIFEST, key))


def local_error(error: OSError, where: str) -> StorageError:
    """Return one line for an error of the local file system, such as a full disk."""
    remedies = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.EACCES: "check its owner and permissions",
        errno.EROFS: "choose a place that can be written",
        errno.ENOTDIR: "a file is where a folder is needed: choose another place",
        errno.EEXIST: "a file is where a folder is needed: choose another place",
    }
    # Of a copy to a full disk, Python names the source.
    is_named = error.filename and not error.filename2 and str(error.filename) != where
    path = f" ({error.filename})" if is_named else ""
    remedy = f"; {remedies[error.errno]}" if error.errno in remedies else ""
    return StorageError(f"{where}: {error.strerror or error}{path}{remedy}")

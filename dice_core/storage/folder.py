"""Where files are kept: one small interface over S3 and over a plain folder.

Keeps the promises of contract.py. Writes appear whole or not at all.
"""

import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dice_core.storage import layout
from dice_core.storage.contract import (
    ConflictError,
    MissingObjectError,
    StorageError,
    StoredObject,
    check_key,
    check_prefix,
    local_error,
    manifests_first,
)
from dice_core.storage.disk_space import full_disk_is_named

# Files of this module in a folder, hidden from `list`: a write that is not complete, a lock.
_UNFINISHED, _LOCK = ".unfinished", ".lock"
_PRIVATE = re.compile(r"\..+(\.unfinished|\.lock)")


class FolderStorage:
    """A folder of this machine (or a shared volume) as storage. The folder is made by the first write."""

    def __init__(self, folder: Path) -> None:
        """Take the folder's path; relative ones are made absolute, so that a URI means the same everywhere."""
        self._folder = Path(os.path.abspath(folder.expanduser()))
        self.uri = str(self._folder)

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See Storage."""
        start = self._folder / check_prefix(self.uri, prefix).rpartition("/")[0]
        found: list[StoredObject] = []
        if not start.is_dir():
            return found
        with self._explained(prefix):
            for parent, _, names in os.walk(start, onerror=_raise):
                for name in names:
                    path = Path(parent, name)
                    key = path.relative_to(self._folder).as_posix()
                    if key.startswith(prefix) and not _PRIVATE.fullmatch(name):
                        found.append(StoredObject(key, path.stat().st_size))
        return sorted(found, key=lambda item: item.key)

    def read_bytes(self, key: str) -> bytes:
        """See Storage."""
        with self._explained(key):
            return self._path(key).read_bytes()

    def write_bytes(self, key: str, data: bytes) -> None:
        """See Storage."""
        with self._explained(key), _written_beside(self._path(key)) as unfinished:
            unfinished.write_bytes(data)

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        """See Storage. The version is the SHA-256 of the content."""
        try:
            data = self.read_bytes(key)
        except MissingObjectError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def write_if_version(self, key: str, data: bytes, version: str | None) -> None:
        """See Storage. Writers that do not use this method are not held off."""
        path = self._path(key)
        with self._explained(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(f".{path.name}{_LOCK}").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                current = self.read_versioned(key)
                if (current[1] if current else None) != version:
                    raise ConflictError(f"{self._name(key)}: changed by somebody else since it was read; read it again")
                self.write_bytes(key, data)

    def upload(self, path: Path, key: str) -> None:
        """See Storage."""
        if not path.is_file():
            raise StorageError(f"{path}: no such file to upload to {self._name(key)}")
        with self._explained(key), _written_beside(self._path(key)) as unfinished:
            shutil.copyfile(path, unfinished)

    def download(self, key: str, path: Path) -> None:
        """See Storage."""
        with self._explained(key), full_disk_is_named(path.parent), _written_beside(path) as unfinished:
            shutil.copyfile(self._path(key), unfinished)

    def delete(self, prefix: str) -> int:
        """See Storage. Folders left empty are removed too."""
        keys = manifests_first([found.key for found in self.list(prefix)])
        with self._explained(prefix):
            for key in keys:
                self._path(key).unlink(missing_ok=True)
            self._remove_empty_folders({parent for key in keys for parent in self._path(key).parents})
        return len(keys)

    def delete_unfinished(self, min_age_seconds: float) -> int:
        """See Storage."""
        newest, num_deleted = time.time() - min_age_seconds, 0
        with self._explained(""):
            for path in self._folder.rglob(f".*{_UNFINISHED}"):
                if path.stat().st_mtime <= newest:
                    path.unlink(missing_ok=True)
                    num_deleted += 1
        return num_deleted

    def _remove_empty_folders(self, folders: set[Path]) -> None:
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            if folder.is_relative_to(self._folder) and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _path(self, key: str) -> Path:
        return self._folder / check_key(self.uri, key)

    def _name(self, key: str) -> str:
        return layout.join(self.uri, key) if key else self.uri

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn the operating system's errors into one line."""
        try:
            yield
        except FileNotFoundError:
            raise MissingObjectError(f"{self._name(key)}: no such file") from None
        except OSError as error:
            raise local_error(error, self._name(key)) from None


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; rename it when the block ends well, remove it when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are for their owner only, and a shared folder has to follow the umask as usual.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)

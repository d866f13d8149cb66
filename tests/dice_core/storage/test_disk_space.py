"""A disk without room is told by the folder that fills it, and by what moves that folder elsewhere."""

import errno
import os
from pathlib import Path

import pytest

from dice_core.storage.contract import StorageError, local_error
from dice_core.storage.disk_space import full_disk_is_named, require_space
from dice_core.storage.manifest import FileEntry, Manifest, fetch_files


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_named_with_what_to_set(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "cache" / "new"
    with pytest.raises(StorageError) as caught, full_disk_is_named(folder):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"{folder}: its disk is full (")
    assert "GiB are free): free some space, or set DICE_CACHE (models) or DICE_SCRATCH" in str(caught.value)


def test_a_copy_that_fills_a_disk_names_its_target(tmp_path: Path) -> None:
    """Python's own error names the source first."""
    full = OSError(errno.ENOSPC, "No space left on device", "/mnt/source/x", None, str(tmp_path / "x"))
    with pytest.raises(StorageError, match=rf"^{tmp_path}: its disk is full"), full_disk_is_named(tmp_path):
        raise full
    assert str(local_error(full, "/mnt/store/x")) == "/mnt/store/x: No space left on device; free some space"


def test_the_error_of_another_disk_or_of_another_kind_is_left_as_it_is(tmp_path: Path) -> None:
    for error in (OSError(errno.ENOSPC, "full", "/elsewhere/x"), PermissionError(errno.EACCES, "denied")):
        with pytest.raises(OSError, match=r"full|denied") as caught, full_disk_is_named(tmp_path):
            raise error
        assert caught.value is error


def test_room_for_all_files_is_looked_for_before_the_first_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_bytes(b"1")
    entries = {"a": FileEntry(1, "0"), "b": FileEntry(2**60, "0")}
    with pytest.raises(StorageError, match=r"target: its disk is full \(1073741824\.00 GiB are needed, \d"):
        fetch_files(str(tmp_path / "store"), Manifest(stage="x", fingerprint="", files=entries), tmp_path / "target")
    assert not (tmp_path / "target").exists()
    require_space(tmp_path / "not" / "there" / "yet", 1)

"""How far a download from the Hub is, by its cache: what was there before counts, leftovers do not."""

import os
from pathlib import Path

import pytest
from huggingface_hub import DryRunFileInfo

from dice_core.models.hub_download import _num_bytes


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name in ("blobs", "snapshots/c0"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def wanted(cache: Path, name: str, size: int) -> DryRunFileInfo:
    place = str(cache / "snapshots" / "c0" / name)
    return DryRunFileInfo("c0", size, name, local_path=place, is_cached=False, will_download=True)


def test_whole_files_and_those_under_way_count_and_leftovers_of_killed_attempts_do_not(cache: Path) -> None:
    files = [wanted(cache, "a.safetensors", 3000), wanted(cache, "b.safetensors", 9000)]
    assert _num_bytes(files, start=100.0) == 0
    (cache / "snapshots" / "c0" / "a.safetensors").write_bytes(bytes(3000))
    under_way, left = cache / "blobs" / "b.1.incomplete", cache / "blobs" / "b.0.incomplete"
    for path, changed in ((under_way, 101), (left, 99)):
        path.write_bytes(b"x" * 4096)
        os.utime(path, (changed, changed))
    assert _num_bytes(files, start=100.0) == 3000 + 4096
    assert _num_bytes([], start=100.0) == 0

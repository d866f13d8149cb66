"""A folder of data is read whole or refused, and what is not data changes nothing: here and on S3 alike."""

import gzip
import json
from pathlib import Path

import pytest

from dice_core.data.records import RecordError
from dice_core.data.source_files import files_below, files_to_read
from dice_core.data.sources import read_prompts
from dice_core.stages.prepare_data import local_sources
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError

ROWS = {name: json.dumps({"prompt": name}).encode() for name in ("one", "two", "three", "four")}
DATA = {
    "a.jsonl": ROWS["one"],
    "b.jsonl.gz": gzip.compress(ROWS["two"]),
    "c.JSONL": ROWS["three"],
    "2026/d.jsonl": ROWS["four"],
}
NOT_DATA = {
    "notes.txt": b"not data",
    "README.md": b"not data",
    "._a.jsonl": b"\x00\x05\x16\x07",
    "_SUCCESS": b"",
    "_old/a.csv": b"old",
    ".cache/e.jsonl": b"old",
}


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of a folder or prefix with every kind of data."""
    uri = str(tmp_path / "data") if request.param == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    put(uri, DATA)
    return uri


def put(uri: str, files: dict[str, bytes]) -> None:
    for key, content in files.items():
        open_storage(uri).write_bytes(key, content)


def read(uri: str) -> tuple[list[str], str]:
    """Return the prompts of a source, and what identifies it."""
    with local_sources({"prompts": uri}) as sources:
        source = sources["prompts"]
        return read_prompts(source.path, name=source.shown).table["prompt"].to_pylist(), source.digest


def test_all_files_with_rows_are_read_and_no_others(place: str) -> None:
    put(place, NOT_DATA)
    assert read(place)[0] == ["four", "one", "two", "three"]
    assert read(f"{place}/") == read(place)


def test_what_is_not_read_does_not_change_what_identifies_a_source(place: str) -> None:
    before = read(place)[1]
    put(place, NOT_DATA)
    assert read(place)[1] == before
    put(place, {"2026/e.jsonl": ROWS["one"]})
    assert read(place)[1] != before


@pytest.mark.parametrize("name", ["e.csv", "2026/E.JSON", "e.jsonl.zst", "e.jsonl.bak", "train.arrow", "e.csv.gz"])
def test_data_in_a_form_that_is_not_read_is_refused_by_name(place: str, name: str) -> None:
    put(place, {name: b"x"})
    with pytest.raises(RecordError, match=rf"{place}: has data that would not be read: {name}; rows are read from"):
        read(place)


def test_one_object_is_read_and_one_that_is_not_there_is_named(s3: str) -> None:
    put(f"{s3}/one", DATA)
    assert read(f"{s3}/one/c.JSONL")[0] == ["three"]
    with pytest.raises(StorageError, match=rf"^{s3}/one/gone\.jsonl: no such file or folder$"):
        read(f"{s3}/one/gone.jsonl")


def test_a_folder_here_and_a_prefix_on_s3_with_the_same_content_are_the_same(s3: str, tmp_path: Path) -> None:
    put(f"{s3}/same", DATA)
    put(str(tmp_path), DATA)
    assert read(f"{s3}/same") == read(str(tmp_path))


def test_a_folder_without_rows_is_refused() -> None:
    with pytest.raises(RecordError, match=r"^data: the folder has no \*\.jsonl and no \*\.parquet file"):
        files_to_read(["README.md", "_SUCCESS", ".x/a.jsonl"], "data")


def test_a_long_list_of_unread_files_is_cut() -> None:
    with pytest.raises(RecordError, match=r"0\.csv, 1\.csv, 2\.csv, 3\.csv, 4\.csv and 2 more; rows"):
        files_to_read([f"{number}.csv" for number in range(7)], "data")


def test_links_are_followed(tmp_path: Path) -> None:
    put(str(tmp_path / "far"), DATA)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "near" / ".#a.jsonl").symlink_to("an editor's lock")
    assert files_below(tmp_path / "near", "near") == [f"linked/{name}" for name in sorted(DATA)]

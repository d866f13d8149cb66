"""Readers trust only what a manifest names."""

import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import (
    Manifest,
    clear_stage,
    fetch_files,
    finished_parts,
    publish_files,
    publish_part,
    read_manifest,
    require_manifest,
)

EMPTY = Manifest(stage="pair", fingerprint="f" * 64, files={})


def write_table(path, values):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"x": values}), path)
    return path


@pytest.fixture
def published(tmp_path):
    """One table with three rows and one text file, published at a folder."""
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "t.parquet")
    (tmp_path / "notes.txt").write_text("hello")
    uri = str(tmp_path / "stage")
    files = {"t.parquet": tmp_path / "t.parquet", "notes.txt": tmp_path / "notes.txt"}
    return uri, publish_files(uri, files, EMPTY)


def test_a_manifest_comes_back_as_written_with_sizes_digests_and_rows(published):
    uri, manifest = published
    assert read_manifest(uri) == manifest
    assert manifest.files["t.parquet"].num_rows == 3
    assert manifest.files["notes.txt"].size == 5
    assert manifest.files["notes.txt"].sha256 == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


def test_nothing_finished_is_none_or_an_error_with_the_remedy(tmp_path):
    assert read_manifest(str(tmp_path / "nowhere")) is None
    with pytest.raises(StorageError, match=r"nowhere: no manifest.json there: .* `dice import-model`"):
        require_manifest(str(tmp_path / "nowhere"))


def test_a_file_changed_after_publishing_is_refused_by_name(published, tmp_path):
    uri, manifest = published
    open_storage(uri).write_bytes("notes.txt", b"HELLO")
    with pytest.raises(StorageError, match=r"notes.txt: 5 bytes, sha256 [0-9a-f]{12}, but its manifest says"):
        fetch_files(uri, manifest, tmp_path / "in")
    assert not (tmp_path / "in" / "notes.txt").exists()


def test_a_file_that_is_gone_is_refused_by_name(published, tmp_path):
    uri, manifest = published
    open_storage(uri).delete("notes.txt")
    with pytest.raises(StorageError, match=r"notes.txt"):
        fetch_files(uri, manifest, tmp_path / "in")


def test_a_file_no_manifest_names_is_not_read(published, tmp_path):
    uri, manifest = published
    open_storage(uri).write_bytes("stray.txt", b"x")
    with pytest.raises(StorageError, match=r"names no file 'stray.txt'"):
        fetch_files(uri, manifest, tmp_path / "in", ["stray.txt"])


def test_the_content_digest_is_of_names_and_contents_alone(published):
    _, manifest = published
    same = Manifest(stage="other", fingerprint="0", files=dict(reversed(manifest.files.items())))
    assert same.content_digest == manifest.content_digest
    fewer = Manifest(stage="pair", fingerprint="f" * 64, files={"t.parquet": manifest.files["t.parquet"]})
    assert fewer.content_digest != manifest.content_digest


def test_a_damaged_manifest_is_an_error_and_not_an_absent_one(published):
    uri, _ = published
    open_storage(uri).write_bytes("manifest.json", b'{"stage": "pair"')
    with pytest.raises(StorageError, match="not a manifest that this version"):
        read_manifest(uri)


def test_fields_of_a_later_version_are_ignored_and_told_where_debugging(published, monkeypatch, capsys):
    uri, manifest = published
    stored = json.loads(open_storage(uri).read_bytes("manifest.json"))
    stored["checksum"] = "blake3"
    stored["files"]["t.parquet"]["codec"] = "zstd"
    open_storage(uri).write_bytes("manifest.json", json.dumps(stored).encode())
    assert read_manifest(uri) == manifest
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("DICE_DEBUG", "1")
    read_manifest(uri)
    assert "fields of a later version are ignored: files.t.parquet.codec, checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"files": {"t.parquet": {"size": "12", "sha256": "0"}}},
            "files.t.parquet.size: Input should be a valid integer",
        ),
        ({"files": {"t.parquet": {"size": 12}}}, "files.t.parquet.sha256: Field required"),
        ({"stage": 3}, "stage: Input should be a valid string"),
        ({"metrics": {"seconds": [1]}}, "metrics.seconds"),
    ],
)
def test_a_known_field_of_another_type_is_named(published, change, message):
    uri, _ = published
    stored = json.loads(open_storage(uri).read_bytes("manifest.json")) | change
    open_storage(uri).write_bytes("manifest.json", json.dumps(stored).encode())
    with pytest.raises(StorageError, match=message) as error:
        read_manifest(uri)
    assert "\n" not in str(error.value)


def test_a_note_on_a_part_of_a_later_version_is_read(tmp_path):
    uri, path = str(tmp_path / "stage"), write_table(tmp_path / "part.parquet", [1])
    part = publish_part(uri, "part-00000.parquet", path, "a")
    note = json.loads(open_storage(uri).read_bytes("part-00000.parquet.part.json"))
    open_storage(uri).write_bytes("part-00000.parquet.part.json", json.dumps(note | {"host": "a"}).encode())
    assert finished_parts(uri, "a") == {"part-00000.parquet": part}


def test_only_whole_parts_of_the_same_fingerprint_are_kept(tmp_path):
    uri, path = str(tmp_path / "stage"), tmp_path / "part.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    part = publish_part(uri, "part-00000.parquet", path, "a")
    cut = publish_part(uri, "part-00001.parquet", write_table(tmp_path / "part-1.parquet", [2]), "a")
    storage = open_storage(uri)
    storage.upload(path, "part-00002.parquet")  # killed before its note was written
    storage.write_bytes(cut.key, b"cut")
    assert finished_parts(uri, "a") == {"part-00000.parquet": part}
    with pytest.raises(StorageError, match="other settings or inputs: take a new run name, or pass --overwrite"):
        finished_parts(uri, "b")


def test_of_two_attempts_at_once_one_part_counts_and_stays_whole(tmp_path):
    uri = str(tmp_path / "stage")
    first, other = (
        write_table(tmp_path / "a" / "part-00000.parquet", [1]),
        write_table(tmp_path / "part-00000.parquet", [2]),
    )
    part = publish_part(uri, "part-00000.parquet", first, "a")
    assert publish_part(uri, "part-00000.parquet", other, "a") == part
    assert finished_parts(uri, "a") == {"part-00000.parquet": part}
    manifest = Manifest(stage="score", fingerprint="a", files={part.key: part.entry})
    assert pq.read_table(fetch_files(uri, manifest, tmp_path / "in")[part.key])["x"].to_pylist() == [1]


def test_a_part_whose_file_is_gone_is_made_again(tmp_path):
    uri, path = str(tmp_path / "stage"), write_table(tmp_path / "part-00000.parquet", [1])
    part = publish_part(uri, "part-00000.parquet", path, "a")
    open_storage(uri).delete(part.key)
    assert finished_parts(uri, "a") == {}
    assert publish_part(uri, "part-00000.parquet", path, "a") == part
    assert finished_parts(uri, "a") == {"part-00000.parquet": part}


def test_overwriting_deletes_a_stage_of_that_name_and_nothing_else(published, tmp_path):
    uri, _ = published
    (tmp_path / "thesis.txt").write_text("mine")
    assert clear_stage(str(tmp_path), "pair") == 0
    with pytest.raises(StorageError, match="holds the result of pair, which train leaves alone"):
        clear_stage(uri, "train")
    assert clear_stage(uri, "pair") == 3
    assert (tmp_path / "thesis.txt").exists()


def test_the_stored_form_is_json_a_person_can_read(published):
    uri, _ = published
    stored = json.loads(open_storage(uri).read_bytes("manifest.json"))
    assert stored["stage"] == "pair"
    assert stored["files"]["t.parquet"]["num_rows"] == 3


class MeetingPath(type(Path())):
    """A path that is opened only when four are being opened."""

    meeting = threading.Barrier(4, timeout=30)

    def open(self, *arguments, **settings):
        self.meeting.wait()
        return super().open(*arguments, **settings)


def test_the_files_of_a_model_travel_together_both_ways(tmp_path):
    """Each is opened for its digest, before it goes up and when it has come down."""
    files = {f"model-{i}.safetensors": MeetingPath(tmp_path / f"{i}") for i in range(8)}
    for index, path in enumerate(files.values()):
        Path(path).write_text(str(index))
    uri = str(tmp_path / "model")
    manifest = publish_files(uri, files, EMPTY)
    paths = fetch_files(uri, manifest, MeetingPath(tmp_path / "in"))
    assert [Path(path).read_text() for path in paths.values()] == list("01234567")


def test_a_file_that_cannot_be_uploaded_leaves_no_manifest(tmp_path):
    (tmp_path / "a").write_text("a")
    with pytest.raises(FileNotFoundError):
        publish_files(str(tmp_path / "out"), {"a": tmp_path / "a", "b": tmp_path / "b"}, EMPTY)
    assert read_manifest(str(tmp_path / "out")) is None

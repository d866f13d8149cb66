"""A place is tried with a tiny write, which leaves nothing where it may be deleted."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dice_core.storage.address import open_storage
from dice_core.storage.contract import NoAccessError, StorageError
from dice_core.storage.probe import require_writable
from pipelines.demo.object_store import ObjectStore
from tests.faulty_store import Line, line_to


@pytest.fixture
def line(s3: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    with line_to(object_store, monkeypatch) as carried:
        yield carried


def test_a_probe_leaves_nothing(s3: str, tmp_path: Path) -> None:
    for uri in (f"{s3}/probed", str(tmp_path / "probed")):
        open_storage(uri).write_bytes("part", b"1")
        require_writable(uri)
        assert [found.key for found in open_storage(uri).list()] == ["part"]
    require_writable(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_place_that_takes_no_file_is_told_with_the_reason(s3: str, line: Line, tmp_path: Path) -> None:
    line.denied = b"PUT "
    with pytest.raises(NoAccessError, match=rf"^{s3}/out/\.probe: {line.endpoint} denies PutObject with these"):
        require_writable(f"{s3}/out")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file is where a folder is needed: choose another place"):
        require_writable(str(tmp_path / "file" / "out"))


def test_a_place_where_nothing_may_be_deleted_is_writable_and_keeps_one_empty_file(
    s3: str, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, line.denied = f"{s3}/kept", b"POST "
    require_writable(uri)
    require_writable(uri)
    assert [(found.key, found.size) for found in open_storage(uri).list()] == [(".probe", 0)]
    assert f"storage: an empty .probe stays at {uri}: " in capsys.readouterr().err

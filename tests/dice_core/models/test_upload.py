"""An import that was killed goes on with the files that storage lacks, and with no others."""

import json
from pathlib import Path

import pytest

from dice_core.models.cache import fetch_model
from dice_core.models.files import read_config
from dice_core.models.importing import import_model
from dice_core.storage.address import open_storage
from dice_core.storage.folder import FolderStorage
from dice_core.storage.manifest import clear_stage, read_manifest


def test_an_import_that_was_killed_uploads_only_what_is_missing(
    model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, upload, uploads = str(tmp_path / "imported"), FolderStorage.upload, []

    def upload_one(self: FolderStorage, path: Path, key: str) -> None:
        if uploads:
            raise KeyboardInterrupt
        uploads.append(key)
        upload(self, path, key)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FolderStorage, "upload", upload_one)
        import_model(str(model_copy), uri)
    assert read_manifest(uri) is None

    def counted(self: FolderStorage, path: Path, key: str) -> None:
        uploads.append(key)
        upload(self, path, key)

    monkeypatch.setattr(FolderStorage, "upload", counted)
    published = import_model(str(model_copy), uri)
    assert len(published.files) >= 3
    assert sorted(uploads) == sorted(published.files)
    assert {found.key for found in open_storage(uri).list()} == {*published.files, "manifest.json"}
    fetch_model(uri, tmp_path / "cache")


def test_what_an_import_of_another_model_left_is_not_taken(
    model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, upload = str(tmp_path / "imported"), FolderStorage.upload

    def stop_at_the_weights(self: FolderStorage, path: Path, key: str) -> None:
        if key.endswith(".safetensors"):
            raise KeyboardInterrupt
        upload(self, path, key)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FolderStorage, "upload", stop_at_the_weights)
        import_model(str(model_copy), uri)
    config = model_copy / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 100}))
    import_model(str(model_copy), uri)
    assert read_config(fetch_model(uri, tmp_path / "cache"))["max_position_embeddings"] == 100


def test_overwrite_deletes_what_a_killed_import_left(
    model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, upload = str(tmp_path / "imported"), FolderStorage.upload

    def stop_at_the_weights(self: FolderStorage, path: Path, key: str) -> None:
        if key.endswith(".safetensors"):
            raise KeyboardInterrupt
        upload(self, path, key)

    monkeypatch.setattr(FolderStorage, "upload", stop_at_the_weights)
    with pytest.raises(KeyboardInterrupt):
        import_model(str(model_copy), uri)
    assert clear_stage(uri, "import-model") > 1
    assert open_storage(uri).list() == []

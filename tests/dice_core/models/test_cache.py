"""Models on this machine: those in folders are used in place, and a disk without room is told by its own name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dice_core.models.cache import fetch_model
from dice_core.models.importing import import_model
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError

pytestmark = pytest.mark.slow


def test_a_model_in_a_folder_is_verified_and_used_there(
    model_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "imported"
    import_model(str(model_copy), str(place))

    assert fetch_model(str(place), tmp_path / "cache") == place
    assert not (tmp_path / "cache").exists()
    said = capfd.readouterr().err
    assert f"model: {place} is checked and used where it is (" in said
    assert "downloading" not in said
    config = place / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 7}))
    with pytest.raises(StorageError, match=r"imported/config\.json: \d+ bytes, .* it was changed or cut"):
        fetch_model(str(place), tmp_path / "cache")
    config.unlink()
    with pytest.raises(StorageError, match=r"imported/config\.json: no such file, but its manifest names it"):
        fetch_model(str(place), tmp_path / "cache")


def test_what_lies_beside_a_model_in_a_folder_is_not_read_with_it(
    model_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Transformers would apply an adapter that it finds there."""
    place = tmp_path / "imported"
    imported = import_model(str(model_copy), str(place))
    (place / "adapter_config.json").write_text("{}")

    folder = fetch_model(str(place), tmp_path / "cache")

    assert {path.name for path in folder.iterdir()} == set(imported.files)
    assert "is copied, since its manifest does not name adapter_config.json" in capfd.readouterr().err


def test_a_cache_without_room_is_told_before_the_download_with_its_folder_and_variable(
    model_copy: Path, s3: str, tmp_path: Path
) -> None:
    uri = f"{s3}/models/huge"
    imported = import_model(str(model_copy), uri)
    huge = {**imported.files, "model.safetensors": replace(imported.files["model.safetensors"], size=2**60)}
    open_storage(uri).write_bytes("manifest.json", replace(imported, files=huge).to_json())
    with pytest.raises(StorageError) as caught:
        fetch_model(uri, tmp_path / "cache")
    said = str(caught.value)
    assert re.match(rf"{tmp_path}/cache/\w+\.unfinished: its disk is full \(1073741824\.\d\d GiB are needed, ", said)
    assert "set DICE_CACHE (models)" in said
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())

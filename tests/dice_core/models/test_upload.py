"""An import that was cut goes on with the files that storage lacks, and with no others."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dice_core.models.cache import fetch_model
from dice_core.models.files import read_config
from dice_core.models.importing import import_model
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import clear_stage, read_manifest


@contextmanager
def weights_are_refused(place: Path) -> Iterator[None]:
    """Put a folder where the weights would go, for the length of a block, whose import fails there."""
    (place / "model.safetensors").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        yield
    (place / "model.safetensors").rmdir()


def inodes(place: Path) -> dict[str, int]:
    """Return a number of each file that changes when it is uploaded again."""
    return {path.name: path.stat().st_ino for path in place.iterdir()}


@pytest.mark.slow
def test_an_import_that_was_cut_uploads_only_what_is_missing(model_copy: Path, tmp_path: Path) -> None:
    place = tmp_path / "imported"
    with weights_are_refused(place):
        import_model(str(model_copy), str(place))
    assert read_manifest(str(place)) is None
    before = inodes(place)
    del before["import-model.part.json"]
    assert "config.json" in before and "tokenizer.json" not in before

    published = import_model(str(model_copy), str(place))
    after = inodes(place)
    assert after.keys() == {*published.files, "manifest.json"}
    assert before.items() <= after.items()
    fetch_model(str(place), tmp_path / "cache")


@pytest.mark.slow
def test_what_an_import_of_another_model_left_is_not_taken(model_copy: Path, tmp_path: Path) -> None:
    place = tmp_path / "imported"
    with weights_are_refused(place):
        import_model(str(model_copy), str(place))
    config = model_copy / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 100}))
    import_model(str(model_copy), str(place))
    assert read_config(fetch_model(str(place), tmp_path / "cache"))["max_position_embeddings"] == 100


def test_overwrite_deletes_what_a_cut_import_left(model_copy: Path, tmp_path: Path) -> None:
    place = tmp_path / "imported"
    with weights_are_refused(place):
        import_model(str(model_copy), str(place))
    assert clear_stage(str(place), "import-model") > 1
    assert open_storage(str(place)).list() == []

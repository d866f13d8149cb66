"""The upload of a model, file by file: an import that was killed goes on with the files that storage lacks.

Unlike the parts of other stages a model's files keep their names, because its index and its readers go by them. What is
there whole is said by one note beside them, until the manifest takes its place.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dice_core.models.files import ModelError
from dice_core.models.weights import ReadBytes, describe_weights
from dice_core.progress import doing, log
from dice_core.storage.address import open_storage
from dice_core.storage.contract import MissingObjectError, Storage, StorageError
from dice_core.storage.manifest import FileEntry, Manifest, clear_stage, describe_file, publish_files
from dice_core.storage.stored_record import read_record

# By its ending --overwrite knows it for the note of a stage that has not finished.
NOTE = "import-model.part.json"


@dataclass(frozen=True)
class _Note:
    """What is there whole, of which import."""

    fingerprint: str
    files: dict[str, FileEntry]


def upload_model(uri: str, files: Mapping[str, Path], manifest: Manifest) -> Manifest:
    """Upload the files that are not there yet, then the manifest that names all.

    Args:
        uri: the model's own place.
        files: name to path on this machine.
        manifest: everything but the files; by its fingerprint an attempt knows what an earlier one left.

    Raises:
        ModelError: weights are not finite; nothing of the model stays there.
    """
    storage = open_storage(uri)
    try:
        entries = _upload(storage, files, manifest)
    except ModelError:
        # Nothing of a broken model is of use to another attempt.
        clear_stage(uri, manifest.stage)
        raise
    complete = publish_files(uri, {}, replace(manifest, files=entries))
    storage.delete(NOTE)
    return complete


def _upload(storage: Storage, files: Mapping[str, Path], manifest: Manifest) -> dict[str, FileEntry]:
    """Upload what is not there yet, each file after it was read and found good."""
    uploaded, entries = _uploaded(storage, manifest.fingerprint), {}
    read = ReadBytes(f"{manifest.stage}: reading", sum(path.stat().st_size for path in files.values()))
    for name, path in files.items():
        with doing(f"reading {name}"):
            entries[name] = describe_weights(path, read) if name.endswith(".safetensors") else describe_file(path)
        if uploaded.get(name) == entries[name]:
            log(f"{manifest.stage}: {name} is there from an earlier attempt")
            continue
        with doing(f"uploading {name}"):
            storage.upload(path, name)
        uploaded[name] = entries[name]
        note = _Note(manifest.fingerprint, uploaded)
        storage.write_bytes(NOTE, json.dumps(asdict(note)).encode())
    return entries


def _uploaded(storage: Storage, fingerprint: str) -> dict[str, FileEntry]:
    """Return what an earlier attempt to import the same model left whole."""
    try:
        note = read_record(_Note, storage.read_bytes(NOTE), f"{storage.uri}/{NOTE}")
    except MissingObjectError:
        return {}
    except ValueError as error:
        raise StorageError(f"{storage.uri}/{NOTE}: cannot be read ({error}): pass --overwrite") from None
    if note.fingerprint != fingerprint:
        # Another model was on its way to this place: nothing of it is taken.
        return {}
    sizes = {found.key: found.size for found in storage.list()}
    return {name: entry for name, entry in note.files.items() if sizes.get(name) == entry.size}

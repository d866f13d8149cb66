"""What a stage finished: a `manifest.json` written last, naming every file with its size and digest.

Readers trust only what a manifest names. The storage moves the bytes; stages/runner.py decides when a stage is skipped.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dice_core import __version__
from dice_core.data.records import RecordError
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import ConflictError, MissingObjectError, Storage, StorageError, UnfitError
from dice_core.storage.disk_space import require_space
from dice_core.storage.stored_record import read_record
from dice_core.storage.transfers import side_by_side

# The note on a finished part of a stage that is still running.
_NOTE_SUFFIX = ".part.json"

Metric = float | int | str


@dataclass(frozen=True)
class FileEntry:
    """One file of a stage: bytes, SHA-256 in hex, rows where it is a table."""

    size: int
    sha256: str
    num_rows: int | None = None


@dataclass(frozen=True)
class Part:
    """A finished part: the key of its file, which holds a digest, and what the file is."""

    key: str
    entry: FileEntry


@dataclass(frozen=True)
class _Note(Part):
    """What is stored beside a finished part, and makes it count."""

    fingerprint: str
    stage: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """As in the manifest that the stage will write."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a stage made, from what, and by which settings."""

    stage: str
    fingerprint: str
    files: dict[str, FileEntry]
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """Name of an input to `uri@content_digest`."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    ran_by: dict[str, Metric] = field(default_factory=dict)
    """What did the work, in how many processes and on how many GPUs: `runner` and the sizes of its parallelism, of the
    attempt that finished. For the record: no result depends on it."""
    text_digests: dict[str, str] = field(default_factory=dict)
    """Of a model, what turns text into token ids: hex digests of its `tokenizer` and its `chat_template`."""
    checks: int = 0
    """Of a model, which checks its import made (models.fitting.CHECKS); 0: fewer than any version counts."""
    skipped: str = ""
    """Why the stage did nothing (a refused policy before it); empty when it ran."""
    package_version: str = __version__

    @property
    def content_digest(self) -> str:
        """Hex digest of the names and contents of the files: the identity of what the stage made."""
        lines = [f"{name} {entry.sha256}" for name, entry in sorted(self.files.items())]
        return hashlib.sha256("\n".join([self.skipped, *lines]).encode()).hexdigest()

    def to_json(self) -> bytes:
        """Return the stored form."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Manifest":
        """Read the stored form.

        Raises:
            StorageError: not a manifest this version can read.
        """
        try:
            return read_record(cls, data, where)
        except ValueError as error:
            raise StorageError(f"{where}: not a manifest that this version ({__version__}) reads: {error}") from None


def read_manifest(uri: str) -> Manifest | None:
    """Return the manifest at a URI, or None where no stage has finished."""
    try:
        data = open_storage(uri).read_bytes(layout.MANIFEST)
    except MissingObjectError:
        return None
    return Manifest.from_json(data, layout.join(uri, layout.MANIFEST))


def require_manifest(uri: str, made_by: str = "the stage that writes it") -> Manifest:
    """Return the manifest at a URI.

    Args:
        uri: where a stage has finished.
        made_by: what a message calls that stage.

    Raises:
        StorageError: none is there, so what lies there is not finished and not to be trusted.
    """
    manifest = read_manifest(uri)
    if manifest is None:
        raise UnfitError(
            f"{uri}: no {layout.MANIFEST} there: {made_by} has not finished, or the address is wrong "
            "(a model or a data set of your own comes in through `dice import-model` or `dice prepare-data`)"
        )
    return manifest


def require_stage(manifest: Manifest, stage: str, uri: str) -> None:
    """Check that what lies at a place is the result of the stage that is to write there.

    Raises:
        StorageError: it is another stage's.
    """
    if manifest.stage != stage:
        raise UnfitError(
            f"{uri}: holds the result of {manifest.stage}, which {stage} leaves alone: choose another place"
        )


def describe_file(path: Path, where: str = "") -> FileEntry:
    """Return size and digest of a file, and its number of rows where it is Parquet.

    Args:
        path: the file.
        where: what a message calls it; the path by default.

    Raises:
        RecordError: called Parquet, and is not.
    """
    try:
        num_rows = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None
    except pa.ArrowInvalid as error:
        raise RecordError(f"{where or path}: not a readable Parquet file: {error}") from None
    return FileEntry(*_size_and_digest(path), num_rows)


def _size_and_digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as stream:
        return path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_files(uri: str, manifest: Manifest, folder: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
    """Download files of a manifest, several at a time, and check each against it.

    Args:
        uri: where the manifest is.
        manifest: what should be there.
        folder: where the files go, under their own names.
        names: only these; all by default.

    Raises:
        StorageError: a file is not named by the manifest, is missing, or differs in size or digest; or the disk of the
            folder has no room for them.
    """
    storage, paths = open_storage(uri), {}
    for name in manifest.files if names is None else names:
        if name not in manifest.files:
            raise UnfitError(f"{uri}: its manifest names no file {name!r}, it names {', '.join(manifest.files)}")
        paths[name] = folder / name
    require_space(folder, sum(manifest.files[name].size for name in paths))
    side_by_side(lambda name: _fetch(storage, name, paths[name], manifest.files[name]), paths)
    return paths


def _fetch(storage: Storage, name: str, path: Path, expected: FileEntry) -> None:
    """Download a file; one that is not what it should be does not stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.download(name, path)
    try:
        _require_same(path, expected, layout.join(storage.uri, name))
    except StorageError:
        path.unlink()
        raise


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check files that are on this machine already against their manifest, several at a time.

    Raises:
        StorageError: a file is missing, or differs in size or digest.
    """
    side_by_side(lambda name: _require_same(folder / name, manifest.files[name], str(folder / name)), names)


def _require_same(path: Path, expected: FileEntry, where: str) -> None:
    try:
        found = _size_and_digest(path)
    except FileNotFoundError:
        raise MissingObjectError(f"{where}: no such file, but its manifest names it") from None
    if found != (expected.size, expected.sha256):
        raise StorageError(
            f"{where}: {found[0]} bytes, sha256 {found[1][:12]}, but its manifest says "
            f"{expected.size} bytes, {expected.sha256[:12]}: it was changed or cut; run its stage again elsewhere"
        )


def publish_files(uri: str, files: Mapping[str, Path], manifest: Manifest) -> Manifest:
    """Upload files, several at a time, then the manifest that names them.

    Args:
        uri: the stage's own place.
        files: name to path on this machine.
        manifest: everything but these files; entries it already has (finished parts) are kept.
    """
    storage = open_storage(uri)

    def publish(item: tuple[str, Path]) -> FileEntry:
        name, path = item
        entry = describe_file(path)
        storage.upload(path, name)
        return entry

    entries = side_by_side(publish, files.items())
    complete = replace(manifest, files={**manifest.files, **dict(zip(files, entries, strict=True))})
    storage.write_bytes(layout.MANIFEST, complete.to_json())
    return complete


def publish_part(uri: str, name: str, path: Path, fingerprint: str, **recorded: Any) -> Part:
    """Upload one finished part of a stage that goes on, then the note that makes it count.

    The key holds the content's digest and the note is written once, so that of two attempts that run at the same time
    (an evicted pod that lives on, and its retry) one part counts, whole, whatever the other does.

    Args:
        uri: the stage's own place.
        name: of the part.
        path: its file.
        fingerprint: of the stage.
        recorded: stage, settings and inputs, for whoever looks before the stage has ended.

    Returns:
        The part that counts: this one, or the other attempt's.
    """
    storage, entry = open_storage(uri), describe_file(path)
    part = Part(f"{path.stem}-{entry.sha256[:12]}{path.suffix}", entry)
    storage.upload(path, part.key)
    note = _Note(part.key, entry, fingerprint, **recorded)
    try:
        storage.write_if_version(name + _NOTE_SUFFIX, json.dumps(asdict(note)).encode(), None)
    except ConflictError:
        return finished_parts(uri, fingerprint).get(name) or _replace_note(uri, name, note, part)
    return part


def _replace_note(uri: str, name: str, note: _Note, part: Part) -> Part:
    """Write over the note of a part whose file is gone."""
    open_storage(uri).write_bytes(name + _NOTE_SUFFIX, json.dumps(asdict(note)).encode())
    return part


def finished_parts(uri: str, fingerprint: str) -> dict[str, Part]:
    """Return the parts an interrupted attempt left whole, by name.

    Raises:
        StorageError: the parts there were made by other settings or from other inputs.
    """
    storage = open_storage(uri)
    sizes = {found.key: found.size for found in storage.list()}
    parts: dict[str, Part] = {}
    keys = sorted(key for key in sizes if key.endswith(_NOTE_SUFFIX))
    for key, data in zip(keys, side_by_side(storage.read_bytes, keys), strict=True):
        note = _read_note(data, layout.join(uri, key))
        if note.fingerprint != fingerprint:
            raise UnfitError(
                f"{uri}: holds parts made with other settings or inputs: take a new run name, or pass --overwrite"
            )
        part = Part(note.key, note.entry)
        if sizes.get(part.key) == part.entry.size:
            parts[key.removesuffix(_NOTE_SUFFIX)] = part
    return parts


def begun_stages(uri: str, keys: Iterable[str]) -> dict[str, Manifest]:
    """Return what stages that have not ended began with, as far as finished parts say it: by place below an address.

    Args:
        uri: of a run.
        keys: of its files.
    """
    notes = {key.rpartition("/")[0]: key for key in keys if key.endswith(_NOTE_SUFFIX)}
    storage = open_storage(uri)
    found = zip(notes, side_by_side(storage.read_bytes, notes.values()), strict=True)
    read = {place: _read_note(data, layout.join(uri, notes[place])) for place, data in found}
    return {
        place: Manifest(
            stage=note.stage, fingerprint=note.fingerprint, files={}, settings=note.settings, inputs=note.inputs
        )
        for place, note in read.items()
        # Version 0.1.0 did not say it.
        if note.stage
    }


def _read_note(data: bytes, where: str) -> _Note:
    try:
        return read_record(_Note, data, where)
    except ValueError as error:
        raise StorageError(f"{where}: not a note that this version ({__version__}) reads: {error}") from None


def clear_stage(uri: str, stage: str) -> int:
    """Delete what a stage left at its place, and nothing that is not a stage's; return the number of files.

    Raises:
        StorageError: another stage's result is there.
    """
    storage, manifest = open_storage(uri), read_manifest(uri)
    if manifest is not None:
        require_stage(manifest, stage, uri)
    elif not any(found.key.endswith(_NOTE_SUFFIX) for found in storage.list()):
        return 0
    return storage.delete("")

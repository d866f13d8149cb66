"""How every stage runs: resolve its inputs, compare fingerprints, skip or resume or refuse, work, publish.

Knows nothing of what a stage computes; stages.py does. All rules on resuming are here.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from dice_core import records
from dice_core.config import Settings
from dice_core.manifest import (
    FileEntry,
    Manifest,
    Metric,
    describe_file,
    fetch_files,
    finished_parts,
    publish_files,
    publish_part,
    read_manifest,
    require_manifest,
)
from dice_core.progress import log
from dice_core.storage import StorageError, open_storage


@dataclass(frozen=True)
class StageReport:
    """What a stage tells its caller. `metrics` are those of the manifest."""

    uri: str
    status: Literal["completed", "already complete", "skipped"]
    metrics: dict[str, Metric]
    message: str = ""


@dataclass(frozen=True)
class Input:
    """A stage's output, or one Parquet file of the user's, that another stage reads."""

    uri: str
    manifest: Manifest

    def fetch(self, folder: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
        """Download files (all by default) into a folder and check them."""
        return fetch_files(self.uri, self.manifest, folder, names)

    def tables(self, prefix: str = "") -> list[str]:
        """Return the names of its Parquet files that begin with a prefix, in order."""
        found = sorted(name for name in self.manifest.files if name.startswith(prefix) and name.endswith(".parquet"))
        if not found:
            raise StorageError(
                f"{self.uri}: has no {prefix}*.parquet, its manifest names {', '.join(self.manifest.files)}"
            )
        return found


@dataclass
class StageContext:
    """What the work of a stage has at hand: its inputs, a scratch folder, and its parts."""

    uri: str
    fingerprint: str
    inputs: dict[str, Input]
    folder: Path
    manifest_fields: dict[str, Any]
    parts: dict[str, FileEntry] = field(default_factory=dict)
    """Finished parts by file name; an interrupted attempt's at first."""

    def group(self, prefix: str) -> list[Input]:
        """Return the inputs named `prefix/0`, `prefix/1`, ... in order."""
        found = [name for name in self.inputs if name.startswith(f"{prefix}/")]
        return [self.inputs[name] for name in sorted(found, key=lambda name: int(name.rsplit("/", 1)[1]))]

    def fetch_tokenizer(self, name: str) -> Path:
        """Download all of a model but its weights: a stage without a GPU needs no more."""
        model, folder = self.inputs[name], self.folder / name
        model.fetch(folder, [file for file in model.manifest.files if not file.endswith(".safetensors")])
        return folder

    def write_table(self, table: pa.Table, schema: pa.Schema, name: str) -> Path:
        """Write a table to the scratch folder, ready to be published."""
        path = self.folder / name
        records.write_table(table, schema, path)
        return path

    def write_json(self, value: object, name: str) -> Path:
        """Write plain values to the scratch folder, ready to be published."""
        path = self.folder / name
        path.write_text(json.dumps(value, indent=1))
        return path

    def publish_part(self, name: str, path: Path) -> None:
        """Store one finished part: another attempt will not do it again."""
        self.parts[name] = publish_part(self.uri, name, path, self.fingerprint)

    def publish(self, files: Mapping[str, Path], metrics: Mapping[str, Metric]) -> Manifest:
        """Store files beside the finished parts, and the manifest."""
        manifest = Manifest(files=dict(self.parts), metrics=dict(metrics), **self.manifest_fields)
        return publish_files(self.uri, files, manifest)

    def skip(self, reason: str) -> Manifest:
        """Record that the stage did nothing, and why; the stages that read it do nothing either."""
        return publish_files(self.uri, {}, Manifest(files={}, skipped=reason, **self.manifest_fields))


def open_input(uri: str) -> Input:
    """Return a finished stage's output, or a single Parquet file that is taken as it is.

    Raises:
        StorageError: nothing finished is there.
    """
    if not uri.endswith(".parquet"):
        return Input(uri, require_manifest(uri))
    parent, _, name = uri.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="dice-") as folder:
        path = Path(folder) / name
        open_storage(parent or ".").download(name, path)
        entry = describe_file(path)
    return Input(parent or ".", Manifest(stage="file", fingerprint=entry.sha256, files={name: entry}))


def run_stage(
    stage: str,
    output_uri: str,
    work: Callable[[StageContext], Manifest],
    *,
    format_version: int,
    settings: Mapping[str, Settings],
    arguments: Mapping[str, str | int],
    inputs: Mapping[str, str],
) -> StageReport:
    """Run a stage unless it is done already.

    Args:
        stage: its name.
        output_uri: its own place.
        work: does the stage's work and publishes; called at most once.
        format_version: raised when the stage's code gives other results for the same settings.
        settings: the validated settings, by name.
        arguments: what else decides the result (seed, shard).
        inputs: name to URI of what it reads.

    Raises:
        StorageError: an input is not finished, or the place holds the result of other settings or inputs.
    """
    resolved = {name: open_input(uri) for name, uri in inputs.items()}
    fingerprint = _fingerprint(stage, format_version, settings, arguments, resolved)
    present = read_manifest(output_uri)
    if present is not None:
        return _reuse(present, fingerprint, output_uri, settings)
    fields = {
        "stage": stage,
        "fingerprint": fingerprint,
        "settings": {**{name: value.to_dict() for name, value in settings.items()}, **arguments},
        "inputs": {name: f"{entry.uri}@{entry.manifest.content_digest}" for name, entry in resolved.items()},
    }
    skipped = next((entry.manifest.skipped for entry in resolved.values() if entry.manifest.skipped), "")
    parts = finished_parts(output_uri, fingerprint)
    if parts:
        log(f"{stage}: {len(parts)} parts of an earlier attempt are kept")
    start = time.monotonic()
    with _scratch_folder() as folder:
        context = StageContext(output_uri, fingerprint, resolved, folder, fields, parts)
        manifest = context.skip(skipped) if skipped else work(context)
    if manifest.skipped:
        log(f"{stage}: skipped: {manifest.skipped}")
        return StageReport(output_uri, "skipped", {}, manifest.skipped)
    log(f"{stage}: completed in {time.monotonic() - start:.0f} s: {output_uri}")
    return StageReport(output_uri, "completed", manifest.metrics)


def clear_output(output_uri: str) -> None:
    """Delete what a stage left at its place (`--overwrite`)."""
    num_deleted = open_storage(output_uri).delete("")
    log(f"overwrite: {num_deleted} files deleted below {output_uri}")


def _reuse(present: Manifest, fingerprint: str, output_uri: str, settings: Mapping[str, Settings]) -> StageReport:
    if present.fingerprint != fingerprint:
        changed = [
            f"{group}.{name} was {present.settings.get(group, {}).get(name)!r}, now {value!r}"
            for group, chosen in settings.items()
            for name, value in chosen.to_dict().items()
            if name not in chosen.operational() and present.settings.get(group, {}).get(name) != value
        ]
        raise StorageError(
            f"{output_uri}: holds the result of other settings or inputs "
            f"({'; '.join(changed) or 'inputs or seed differ'}): take a new run name, or pass --overwrite"
        )
    if present.skipped:
        return StageReport(output_uri, "skipped", {}, present.skipped)
    log(f"{present.stage}: already complete: {output_uri}")
    return StageReport(output_uri, "already complete", present.metrics)


def _fingerprint(
    stage: str,
    format_version: int,
    settings: Mapping[str, Settings],
    arguments: Mapping[str, str | int],
    inputs: Mapping[str, Input],
) -> str:
    facts = {
        "stage": stage,
        "format_version": format_version,
        "settings": {name: value.fingerprint() for name, value in settings.items()},
        "arguments": dict(arguments),
        "inputs": {name: entry.manifest.content_digest for name, entry in inputs.items()},
    }
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dice-", dir=os.environ.get("DICE_SCRATCH")) as folder:
        yield Path(folder)

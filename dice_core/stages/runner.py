"""How every stage runs: resolve its inputs, compare fingerprints, skip or resume or refuse, work, publish.

Knows nothing of what a stage computes: its own file does. All rules on resuming are here.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa

from dice_core import __version__
from dice_core.accelerator import num_gpus
from dice_core.data import records
from dice_core.progress import log
from dice_core.settings.base import Settings
from dice_core.stages.identity import differences, fingerprint
from dice_core.stages.table import STAGES, TRAIN, Stage
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError, UnfitError
from dice_core.storage.disk_space import full_disk_is_named
from dice_core.storage.manifest import (
    Manifest,
    Metric,
    Part,
    clear_stage,
    describe_file,
    fetch_files,
    finished_parts,
    publish_files,
    publish_part,
    read_manifest,
    require_manifest,
    require_stage,
)
from dice_core.storage.probe import require_writable
from dice_core.storage.scratch import scratch_root
from dice_core.tracking.run_tracking import Tracked, tracked_stage

Value = TypeVar("Value")

_USERS_FILE = "file"
# An upload that a killed attempt began is dead by then; one of an attempt that still runs may not be.
_DEAD_UPLOAD_SECONDS = 24 * 3600


@dataclass(frozen=True)
class StageReport:
    """What a stage tells its caller. `metrics` are those of the manifest."""

    uri: str
    status: Literal["completed", "already complete", "skipped"]
    metrics: dict[str, Metric]
    message: str = ""


@dataclass(frozen=True)
class Input:
    """What a stage reads: another stage's output, or a user's own Parquet file."""

    uri: str
    manifest: Manifest
    users_path: Path | None = None
    """The user's own file on this machine, downloaded to identify it."""

    def fetch(self, folder: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
        """Download files (all by default) into a folder and check them; a user's own file stays where it is."""
        if self.users_path is not None:
            return {self.users_path.name: self.users_path}
        return fetch_files(self.uri, self.manifest, folder, names)

    @property
    def is_users_file(self) -> bool:
        """Whether it is a Parquet file of nobody's run."""
        return self.users_path is not None

    def tables(self, prefix: str = "") -> list[str]:
        """Return the names of its Parquet files that begin with a prefix, in order; a shard may have none."""
        return sorted(name for name in self.manifest.files if name.startswith(prefix) and name.endswith(".parquet"))

    def require_same(self, name: str, other: "Input") -> None:
        """Check that this input was made from that other one.

        Args:
            name: what the stage that made this calls the other.
            other: what the caller was given for it.

        Raises:
            StorageError: it was made from something else, so the two do not belong together.
        """
        recorded = self.manifest.inputs.get(name, "")
        if recorded and recorded.rpartition("@")[2] != other.manifest.content_digest:
            raise UnfitError(
                f"{self.uri}: was made with {name} {recorded.rpartition('@')[0]}, which is not what lies at "
                f"{other.uri}: give the {name} that it was made with"
            )


@dataclass
class StageContext:
    """What the work of a stage has at hand: its inputs, a scratch folder, and its parts."""

    uri: str
    fingerprint: str
    inputs: dict[str, Input]
    folder: Path
    manifest_fields: dict[str, Any]
    parts: dict[str, Part] = field(default_factory=dict)
    """Finished parts by name; an interrupted attempt's at first."""
    ran_by: dict[str, Metric] = field(default_factory=dict)
    """What the manifest is to say of how the work was done (Manifest.ran_by)."""
    cleanup: ExitStack = field(default_factory=ExitStack)
    """Closed when the work has ended or failed, before the scratch folder goes."""
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Return how long the work has taken so far."""
        return round(time.monotonic() - self.started, 1)

    @property
    def stored(self) -> Input:
        """The finished parts, of this attempt or an earlier one, to be read as an input is."""
        files = {part.key: part.entry for part in self.parts.values()}
        return Input(self.uri, Manifest(stage="", fingerprint=self.fingerprint, files=files))

    def group(self, prefix: str) -> list[Input]:
        """Return the inputs named `prefix/0`, `prefix/1`, ... in order."""
        found = [name for name in self.inputs if name.startswith(f"{prefix}/")]
        return [self.inputs[name] for name in sorted(found, key=lambda name: int(name.rsplit("/", 1)[1]))]

    def refused_policy(self) -> str:
        """Return why the iteration before has refused the policy that this one would go on with; empty: it has not."""
        gate = self.inputs.get("gate")
        if not gate or gate.manifest.metrics.get("accepted"):
            return ""
        return f"the policy was refused by {gate.uri}: {gate.manifest.metrics.get('reason')}"

    def fetch_tokenizer(self, name: str) -> Path:
        """Download all of a model but its weights: a stage without a GPU needs no more."""
        model, folder = self.inputs[name], self.folder / name
        model.fetch(folder, [file for file in model.manifest.files if not file.endswith(".safetensors")])
        return folder

    def until_end(self, values: Generator[Value, None, None]) -> Generator[Value, None, None]:
        """Return a generator that is closed with the work, so that what it does in threads does not outlive that."""
        self.cleanup.callback(values.close)
        return values

    def write_table(self, table: pa.Table, schema: pa.Schema, name: str) -> Path:
        """Write a table to the scratch folder, ready to be published."""
        path = self.folder / name
        records.write_table(table, schema, path)
        return path

    def write_tables(self, tables: Iterable[pa.Table], schema: pa.Schema, name: str) -> Path:
        """Write tables to one file in the scratch folder, each when it is made, ready to be published."""
        path = self.folder / name
        records.write_tables(tables, schema, path)
        return path

    def write_json(self, value: object, name: str) -> Path:
        """Write plain values to the scratch folder, ready to be published."""
        path = self.folder / name
        path.write_text(json.dumps(value, indent=1))
        return path

    def publish_part(self, name: str, path: Path) -> bool:
        """Store one finished part: another attempt will not do it again.

        Returns:
            Whether the part that counts is this one, and not one of an attempt that ran at the same time.
        """
        self.parts[name] = publish_part(self.uri, name, path, **self.manifest_fields)
        return self.parts[name].entry == describe_file(path)

    def publish(self, files: Mapping[str, Path], metrics: Mapping[str, Metric]) -> Manifest:
        """Store files beside the finished parts, and the manifest; it says how many GPUs the stage held, if any."""
        gpus = num_gpus() if STAGES[self.manifest_fields["stage"]].pod == "gpu" else 0
        metrics = {**metrics, **({"num_gpus": gpus} if gpus else {})}
        files_made = self.stored.manifest.files
        manifest = Manifest(files=files_made, metrics=metrics, ran_by=self.ran_by, **self.manifest_fields)
        return publish_files(self.uri, files, manifest)

    def skip(self, reason: str) -> Manifest:
        """Record that the stage did nothing, and why; the stages that read it do nothing either."""
        return publish_files(self.uri, {}, Manifest(files={}, skipped=reason, **self.manifest_fields))


def open_input(uri: str, makers: Sequence[str], folder: Path) -> Input:
    """Return a finished stage's output, or a single Parquet file that is taken as it is.

    Args:
        uri: of either.
        makers: the stages that make such an input.
        folder: gets the single file.

    Raises:
        StorageError: nothing finished is there, or the result of a stage that makes no such input.
    """
    if not uri.endswith(".parquet"):
        commands = [f"`dice {stage}`" for stage in makers]
        made_by = " or ".join(filter(None, (", ".join(commands[:-1]), commands[-1])))
        if os.path.isfile(uri):
            raise UnfitError(f"{uri}: a file, where the result of {made_by} is needed: give the folder it wrote")
        manifest = require_manifest(uri, made_by)
        if manifest.stage not in makers:
            raise UnfitError(f"{uri}: holds the result of {manifest.stage}, where that of {made_by} is needed")
        return Input(uri, manifest)
    parent, _, name = uri.rpartition("/")
    open_storage(parent or ".").download(name, folder / name)
    entry = describe_file(folder / name, uri)
    manifest = Manifest(stage=_USERS_FILE, fingerprint=entry.sha256, files={name: entry})
    return Input(parent or ".", manifest, folder / name)


def run_stage(
    stage: Stage,
    output_uri: str,
    work: Callable[[StageContext], Manifest],
    *,
    settings: Mapping[str, Settings],
    arguments: Mapping[str, str | float],
    inputs: Mapping[str, str],
    noted: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> StageReport:
    """Run a stage unless it is done already.

    Args:
        stage: its row of the table.
        output_uri: its own place.
        work: does the stage's work and publishes; called at most once.
        settings: the validated settings, by name.
        arguments: what else decides the result (seed, shard).
        inputs: name to URI of what it reads.
        noted: what the manifest says beside the settings, and the result does not depend on.
        overwrite: delete what this stage left at its place before, once settings and inputs are known to be good.

    Raises:
        StorageError: an input is not finished, or the place holds the result of other settings or inputs.
    """
    with scratch_folder() as folder:
        resolved = {
            name: open_input(uri, stage.inputs[name.partition("/")[0]], folder / "inputs" / name)
            for name, uri in inputs.items()
        }
        digests = {name: entry.manifest.content_digest for name, entry in resolved.items()}
        identity = fingerprint(stage, settings, arguments, digests)
        if overwrite:
            num_deleted = clear_stage(output_uri, stage.name)
            log(f"{stage.name}: {num_deleted} files of an earlier run deleted below {output_uri}")
        present = read_manifest(output_uri)
        if present is not None:
            require_stage(present, stage.name, output_uri)
            return _reuse(present, identity, output_uri, settings, arguments)
        fields = {
            "stage": stage.name,
            "fingerprint": identity,
            "settings": {**{name: value.to_dict() for name, value in settings.items()}, **arguments, **(noted or {})},
            "inputs": {name: f"{entry.uri}@{entry.manifest.content_digest}" for name, entry in resolved.items()},
        }
        parts = finished_parts(output_uri, identity)
        return _run(StageContext(output_uri, identity, resolved, folder, fields, parts), work)


def _run(context: StageContext, work: Callable[[StageContext], Manifest]) -> StageReport:
    stage, output_uri = context.manifest_fields["stage"], context.uri
    if context.parts:
        log(f"{stage}: {len(context.parts)} parts of an earlier attempt are kept")
    _delete_dead_uploads(stage, output_uri)
    skipped = next((entry.manifest.skipped for entry in context.inputs.values() if entry.manifest.skipped), "")
    if not skipped:
        require_writable(output_uri)
    with context.cleanup, _tracked(context) if not skipped else nullcontext() as tracked:
        manifest = context.skip(skipped) if skipped else work(context)
        if tracked:
            tracked.describe(manifest.metrics)
    if manifest.skipped:
        log(f"{stage}: skipped: {manifest.skipped}")
        return StageReport(output_uri, "skipped", {}, manifest.skipped)
    log(f"{stage}: completed in {context.seconds():.0f} s: {output_uri}")
    return StageReport(output_uri, "completed", manifest.metrics)


def _tracked(context: StageContext) -> AbstractContextManager[Tracked]:
    stage, settings = context.manifest_fields["stage"], context.manifest_fields["settings"]
    # Training's work is done by other processes, maybe of other machines.
    is_here = stage != TRAIN.name
    return tracked_stage(stage, context.uri, context.fingerprint, settings, measures_machine=is_here)


def _delete_dead_uploads(stage: str, uri: str) -> None:
    """Delete what killed attempts left half uploaded. A bucket may forbid to look for it: no reason to do nothing."""
    try:
        num_deleted = open_storage(uri).delete_unfinished(_DEAD_UPLOAD_SECONDS)
    except StorageError as error:
        log(f"{stage}: uploads that were never finished are not looked for: {error}")
        return
    if num_deleted:
        log(f"{stage}: {num_deleted} uploads of killed attempts deleted below {uri}")


def _reuse(
    present: Manifest,
    identity: str,
    output_uri: str,
    settings: Mapping[str, Settings],
    arguments: Mapping[str, str | float],
) -> StageReport:
    if present.fingerprint != identity:
        changed = "; ".join(map(str, differences(present, settings, arguments)))
        raise UnfitError(
            f"{output_uri}: holds the result of other settings or inputs "
            f"({changed or f'inputs, or the version: made by {present.package_version}, this is {__version__}'}): "
            "take a new run name, or pass --overwrite"
        )
    if present.skipped:
        return StageReport(output_uri, "skipped", {}, present.skipped)
    log(f"{present.stage}: already complete: {output_uri}")
    return StageReport(output_uri, "already complete", present.metrics)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder for files on their way, below DICE_SCRATCH where that is set; gone at the end.

    Raises:
        StorageError: its disk has filled up.
    """
    with (
        tempfile.TemporaryDirectory(prefix="dice-", dir=scratch_root()) as folder,
        full_disk_is_named(Path(folder)),
    ):
        yield Path(folder)

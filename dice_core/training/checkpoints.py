"""Checkpoints of a training run: marked complete here, copied to storage while training goes on, found again.

    URI/checkpoint-<step>/node-<i>/    the files of one node, with a manifest.json written last

The trainer decides what is inside a checkpoint. Only complete ones of the same job and the same processes count.
"""

import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dice_core.progress import log
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, fetch_files, publish_files, read_manifest
from dice_core.training import ranks
from dice_core.training.copies import Copies

NUM_KEPT = 2
_COMPLETE = "complete.json"
_STEP = re.compile(r"checkpoint-(\d+)")
_STORED = re.compile(rf"checkpoint-(\d+)/node-0/{re.escape(layout.MANIFEST)}")


@dataclass(frozen=True)
class CheckpointOwner:
    """What must agree before a checkpoint is resumed from."""

    fingerprint: str
    """Of the job: policy, pairs, settings, seed."""
    num_processes: int
    num_nodes: int
    deepspeed: str
    """DeepSpeed's shards fit only the same number of processes."""

    def accepts(self, made_by: dict[str, Any]) -> bool:
        """Return whether this run can go on from a checkpoint made by that one."""
        mine = asdict(self)
        names = ["fingerprint", "deepspeed"]
        if self.deepspeed != "none":
            names += ["num_processes", "num_nodes"]
        return all(made_by.get(name) == mine[name] for name in names)


class CheckpointStore:
    """The checkpoints of one training run, on this machine and in storage."""

    def __init__(self, uri: str, folder: Path, owner: CheckpointOwner, copies: Copies) -> None:
        """Take where copies are kept, where the trainer writes on this machine, and what its node copies."""
        self._uri, self._folder, self._owner, self._copies = uri, folder, owner, copies
        self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, on this machine: fetched from storage where it is only there.

        Every process calls this and gets the same.
        """
        step, is_local = ranks.broadcast(self._choose() if ranks.rank() == 0 else None)
        folder = self._folder / f"checkpoint-{step}"
        if ranks.local_rank() == 0:
            # One of another number of processes may have a higher step than all that follow.
            self._delete_local_except(step)
        if not step:
            return None
        if not is_local and ranks.local_rank() == 0:
            self._fetch(step, folder)
        ranks.barrier()
        return folder

    def save(self, step: int) -> None:
        """Mark a checkpoint that every process of this node has written, and start to copy it to storage.

        Waits for the copy before it: a machine never has more than one on its way. Older ones of this machine go; the
        Trainer would delete those of the first node only. A copy that fails is told and stops no training: the next
        checkpoint is copied anew. A process that is told to stop begins none.
        """
        folder = self._folder / f"checkpoint-{step}"
        temporary = folder / f"{_COMPLETE}.unfinished"
        temporary.write_text(json.dumps(asdict(self._owner)))
        os.replace(temporary, folder / _COMPLETE)
        if self._copies.is_ending.is_set():
            return
        under_way = self._copies.begin()
        self.wait()
        self._delete_local_except(*self._on_disk()[-NUM_KEPT:])
        self._pending = self._uploads.submit(self._copy, step, folder, under_way)

    def wait(self) -> None:
        """Wait for the copy under way."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def delete_all(self) -> None:
        """Delete every checkpoint, here and in storage: the finished model has been published."""
        self.wait()
        try:
            open_storage(self._uri).delete("")
        except StorageError as error:
            log(f"train: the checkpoints of the finished training stay in storage: {error}")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _choose(self) -> tuple[int, bool]:
        local = max(self._local_steps(), default=0)
        stored = max(self._stored_steps(), default=0)
        return (local, True) if local >= stored else (stored, False)

    def _local_steps(self) -> list[int]:
        # With several nodes another one may have been replaced: storage alone has all of a checkpoint.
        if self._owner.num_nodes > 1:
            return []
        markers = {step: self._folder / f"checkpoint-{step}" / _COMPLETE for step in self._on_disk()}
        return [
            step
            for step, marker in markers.items()
            if marker.is_file() and self._owner.accepts(json.loads(marker.read_text()))
        ]

    def _on_disk(self) -> list[int]:
        """Return the steps of this machine's folders in order, complete or not."""
        folders = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted(int(match[1]) for folder in folders if (match := _STEP.fullmatch(folder.name)))

    def _delete_local_except(self, *kept: int) -> None:
        for step in set(self._on_disk()) - set(kept):
            shutil.rmtree(self._folder / f"checkpoint-{step}")

    def _stored_steps(self) -> list[int]:
        found = (_STORED.fullmatch(entry.key) for entry in open_storage(self._uri).list())
        return [step for step in sorted(int(match[1]) for match in found if match) if self._is_usable(step)]

    def _is_usable(self, step: int) -> bool:
        """Return whether every node's part is complete and of this run: another run's may lie at the same step."""
        first = read_manifest(self._node_uri(step, 0))
        num_nodes = int(first.settings.get("num_nodes", 0)) if first else 0
        others = [read_manifest(self._node_uri(step, node)) for node in range(1, num_nodes)]
        return bool(num_nodes) and all(
            part is not None and part.settings.get("num_nodes") == num_nodes and self._owner.accepts(part.settings)
            for part in (first, *others)
        )

    def _fetch(self, step: int, folder: Path) -> None:
        log(f"train: fetching checkpoint {step} from {self._uri}")
        shutil.rmtree(folder, ignore_errors=True)
        first = read_manifest(self._node_uri(step, 0))
        for node in range(int(first.settings["num_nodes"]) if first else 0):
            uri = self._node_uri(step, node)
            manifest = read_manifest(uri)
            if manifest is not None:
                fetch_files(uri, manifest, folder)

    def _copy(self, step: int, folder: Path, under_way: IO[str]) -> None:
        with under_way:
            try:
                self._upload(step, folder)
            except (StorageError, OSError) as error:
                log(f"train: checkpoint {step} is not stored, training goes on and stores the next one: {error}")
                return
            try:
                if ranks.rank() == 0:
                    self._prune()
            except StorageError as error:
                log(f"train: older checkpoints stay in storage until the next one: {error}")

    def _upload(self, step: int, folder: Path) -> None:
        # The marker stays here: a copy is complete when its manifest is there.
        paths = [path for path in folder.rglob("*") if path.is_file() and path.name != _COMPLETE]
        files = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
        owner = Manifest(
            stage="checkpoint", fingerprint=self._owner.fingerprint, files={}, settings=asdict(self._owner)
        )
        uri = self._node_uri(step, ranks.node_rank())
        # What another run left here would be counted as part of this one.
        open_storage(uri).delete("")
        publish_files(uri, files, owner)

    def _prune(self) -> None:
        """Delete what is older than the newest checkpoints that this run could go on from.

        Checkpoints of other runs count for nothing: their steps may be later than this run's. One that another node is
        still copying does not count yet.
        """
        storage, usable = open_storage(self._uri), self._stored_steps()
        steps = {int(match[1]) for found in storage.list() if (match := _STEP.match(found.key))}
        for step in steps if len(usable) >= NUM_KEPT else ():
            if step < usable[-NUM_KEPT]:
                storage.delete(f"checkpoint-{step}/")

    def _node_uri(self, step: int, node: int) -> str:
        return layout.join(self._uri, f"checkpoint-{step}", f"node-{node}")


class CheckpointCallback(TrainerCallback):
    """Hands each checkpoint the Trainer has written to the store. Must come after callbacks that add files to it."""

    def __init__(self, store: CheckpointStore) -> None:
        """Take the run's store."""
        self._store = store

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave out the checkpoint of the last step: the model itself follows at once."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait until every process has written its part, then mark and copy."""
        ranks.barrier()
        if ranks.local_rank() == 0:
            self._store.save(state.global_step)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let no copy be cut off."""
        self._store.wait()

"""Checkpoints as files: their names, whose they are, and which are complete, on this machine and in storage.

    FOLDER/checkpoint-<step>/                  every process's files, with complete-<rank>.json last
    URI/checkpoint-<step>/rank-<r>/            the files of one process, with a manifest.json last

Only complete ones of the same job and the same processes count. Loads no torch.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.manifest import read_manifest

_MARKER = "complete-{}.json"
_STEP = re.compile(r"checkpoint-(\d+)")
_STORED = re.compile(rf"checkpoint-(\d+)/rank-0/{re.escape(layout.MANIFEST)}")


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


def step_folder(folder: Path, step: int) -> Path:
    """Return where a checkpoint is on this machine."""
    return folder / f"checkpoint-{step}"


def rank_uri(uri: str, step: int, rank: int) -> str:
    """Return where a process's part of a checkpoint is stored."""
    return layout.join(uri, f"checkpoint-{step}", f"rank-{rank}")


def mark(folder: Path, step: int, rank: int, owner: CheckpointOwner) -> None:
    """Say that a process has written its whole part."""
    path = step_folder(folder, step) / _MARKER.format(rank)
    temporary = path.with_name(f"{path.name}.unfinished")
    temporary.write_text(json.dumps(asdict(owner)))
    os.replace(temporary, path)


def is_marker(name: str) -> bool:
    """Return whether a file of a checkpoint says that a part is complete."""
    return name.startswith("complete-")


def on_disk(folder: Path) -> list[int]:
    """Return the steps of this machine's folders in order, complete or not."""
    folders = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(match[1]) for entry in folders if (match := _STEP.fullmatch(entry.name)))


def delete_on_disk(folder: Path, steps: Iterable[int]) -> None:
    """Delete checkpoints of this machine."""
    for step in steps:
        shutil.rmtree(step_folder(folder, step), ignore_errors=True)


def is_complete_on_disk(folder: Path, step: int, owner: CheckpointOwner) -> bool:
    """Return whether every process of a run on one node has written its part."""
    markers = [step_folder(folder, step) / _MARKER.format(rank) for rank in range(_num_parts(folder, step))]
    return bool(markers) and all(path.is_file() and owner.accepts(json.loads(path.read_text())) for path in markers)


def _num_parts(folder: Path, step: int) -> int:
    """Return by how many processes a checkpoint was made, which need not be today's number; 0 where none says it."""
    first = step_folder(folder, step) / _MARKER.format(0)
    return int(json.loads(first.read_text())["num_processes"]) if first.is_file() else 0


def stored_steps(uri: str, owner: CheckpointOwner) -> list[int]:
    """Return the steps in storage, in order, that a run could go on from."""
    found = (_STORED.fullmatch(entry.key) for entry in open_storage(uri).list())
    return [step for step in sorted(int(match[1]) for match in found if match) if _is_complete(uri, step, owner)]


def num_stored_parts(uri: str, step: int) -> int:
    """Return how many parts a stored checkpoint has, one a process."""
    first = read_manifest(rank_uri(uri, step, 0))
    return int(first.settings.get("num_processes", 0)) if first else 0


def delete_older(uri: str, owner: CheckpointOwner) -> None:
    """Delete in storage what is older than the newest checkpoint that a run could go on from.

    Checkpoints of other runs count for nothing: their steps may be later than this run's. One that another process is
    still storing does not count yet.
    """
    storage, usable = open_storage(uri), stored_steps(uri, owner)
    for step in {int(match[1]) for found in storage.list() if (match := _STEP.match(found.key))}:
        if usable and step < usable[-1]:
            storage.delete(f"checkpoint-{step}/")


def _is_complete(uri: str, step: int, owner: CheckpointOwner) -> bool:
    """Return whether every part is complete and of this run: another run's may lie at the same step."""
    parts = [read_manifest(rank_uri(uri, step, rank)) for rank in range(num_stored_parts(uri, step))]
    return bool(parts) and all(part is not None and owner.accepts(part.settings) for part in parts)

"""Writes and stores checkpoints for a training process, in a process of its own: training does not wait for a disk.

    python -m dice_core.training.checkpoint_process MEMORY    orders on standard input, answers on standard output

Reads what is staged in the memory (`staging.py`), writes it, marks it complete, copies it to storage, and deletes what
is older there. `checkpoints.py` gives the orders and knows when. Loads no torch.
"""

import mmap
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from dice_core.child_processes import end_with_parent
from dice_core.progress import log
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files
from dice_core.training.checkpoint_files import (
    CheckpointOwner,
    delete_older,
    mark,
    rank_uri,
    step_folder,
)

ENDED = b"ended\n"
"""The answer to each order: it is stored, or given up."""
_CHUNK = 64 << 20


@dataclass(frozen=True)
class StagedFile:
    """A file to write below a checkpoint's folder: some bytes, and a range of the memory behind them."""

    path: str
    head: bytes
    start: int = 0
    size: int = 0


@dataclass(frozen=True)
class Order:
    """One process's part of a checkpoint."""

    step: int
    folder: str
    """Of all checkpoints on this machine."""
    uri: str
    """Of all checkpoints in storage."""
    owner: CheckpointOwner
    rank: int
    staged: Sequence[StagedFile]
    others: Sequence[str]
    """Files that are written already and that this process stores, below the checkpoint's folder."""


def main(descriptor: int) -> None:
    """Carry out orders until standard input ends."""
    end_with_parent(os.getppid())
    os.nice(10)
    # Whoever stops training stops its processes; what is being stored is finished first.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    # Whatever prints must not answer.
    os.dup2(2, 1)
    while True:
        try:
            order: Order = pickle.load(orders)
        except EOFError:
            return
        _carry_out(order, descriptor)
        answers.write(ENDED)


def _carry_out(order: Order, descriptor: int) -> None:
    what = "written"
    try:
        _write(order, descriptor)
        what = "stored"
        _store(order)
    except (StorageError, OSError) as error:
        log(f"train: checkpoint {order.step} is not {what}, training goes on and stores the next one: {error}")


def _write(order: Order, descriptor: int) -> None:
    """Write what is staged, and say that it is whole."""
    folder = step_folder(Path(order.folder), order.step)
    with _read(descriptor) as memory, memoryview(memory) as view:
        for staged in order.staged:
            path = folder / staged.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(staged.head)
                for begin in range(staged.start, staged.start + staged.size, _CHUNK):
                    with view[begin : min(begin + _CHUNK, staged.start + staged.size)] as chunk:
                        file.write(chunk)
    mark(Path(order.folder), order.step, order.rank, order.owner)


def _read(descriptor: int) -> AbstractContextManager[mmap.mmap | bytes]:
    size = os.fstat(descriptor).st_size
    return mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size else nullcontext(b"")


def _store(order: Order) -> None:
    folder, uri = step_folder(Path(order.folder), order.step), rank_uri(order.uri, order.step, order.rank)
    names = sorted({*(staged.path for staged in order.staged), *order.others})
    settings = {**asdict(order.owner), "rank": order.rank}
    owner = Manifest(stage="checkpoint", fingerprint=order.owner.fingerprint, files={}, settings=settings)
    # What another run left here would be counted as part of this one.
    open_storage(uri).delete("")
    publish_files(uri, {name: folder / name for name in names}, owner)
    if order.rank == 0:
        try:
            delete_older(order.uri, order.owner)
        except StorageError as error:
            log(f"train: older checkpoints stay in storage until the next one: {error}")


if __name__ == "__main__":
    main(int(sys.argv[1]))

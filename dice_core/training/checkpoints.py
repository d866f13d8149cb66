"""Checkpoints of a training run: when one is made, how it leaves the processes that train, and which is gone on from.

The trainer decides what is inside a checkpoint. `staging.py` copies it in memory, `checkpoint_process.py` writes and
stores it meanwhile, `checkpoint_files.py` has the names.
"""

import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dice_core.progress import log
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import fetch_files, read_manifest
from dice_core.training import ranks
from dice_core.training.checkpoint_files import (
    CheckpointOwner,
    delete_on_disk,
    is_complete_on_disk,
    is_marker,
    num_stored_parts,
    on_disk,
    rank_uri,
    step_folder,
    stored_steps,
)
from dice_core.training.checkpoint_process import ENDED, Order, StagedFile
from dice_core.training.copies import Copies
from dice_core.training.settings import TrainingConfig
from dice_core.training.staging import StagingMemory


class CheckpointStore:
    """The checkpoints of one training run, as one of its processes sees them."""

    def __init__(self, uri: str, folder: Path, owner: CheckpointOwner, copies: Copies) -> None:
        """Take where copies are kept, where the trainer writes on this machine, and what its node copies."""
        self._uri, self._folder, self._owner, self._copies = uri, folder, owner, copies
        self._memory = StagingMemory()
        self._staged: list[StagedFile] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._follower: Thread | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is written or stored: the memory is free, and the machine has one checkpoint at most."""
        return self._follower is None or not self._follower.is_alive()

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, on this machine: fetched from storage where it is only there.

        Every process calls this and gets the same.
        """
        step, is_local = ranks.broadcast(self._choose() if ranks.rank() == 0 else None)
        if ranks.local_rank() == 0:
            # One of another number of processes may have a higher step than all that follow.
            delete_on_disk(self._folder, set(on_disk(self._folder)) - ({step} if is_local else set()))
        ranks.barrier()
        if not step:
            return None
        if not is_local:
            self._fetch(step)
        ranks.barrier()
        return step_folder(self._folder, step)

    def stage_state(self, state: Any, path: Path | str) -> None:
        """Copy a state in memory, to be written at a path of the checkpoint that the trainer makes."""
        self._staged += self._memory.stage(state, self._below(path))

    def stage_tensors(self, tensors: Mapping[str, Tensor], path: Path | str) -> None:
        """Copy tensors in memory, to be written as safetensors at a path of the checkpoint that the trainer makes."""
        self._staged += self._memory.stage_tensors(tensors, self._below(path))

    def save(self, step: int) -> None:
        """Have a checkpoint written and stored that every process has staged; training goes on.

        Every process calls this when it is idle. A failure is told and stops no training: the next one is stored.
        """
        self.wait()
        ranks.barrier()
        others = self._written(step) if ranks.local_rank() == 0 else []
        ranks.barrier()
        order = Order(
            step=step,
            folder=str(self._folder),
            uri=self._uri,
            owner=self._owner,
            rank=ranks.rank(),
            staged=self._staged,
            others=others,
        )
        self._staged = []
        self._memory.clear()
        # In this thread: Linux ends the process with the thread that started it.
        if self._process is None or self._process.poll() is not None:
            self._process = _start(self._memory.descriptor)
        self._follower = Thread(target=_follow, args=(self._process, order, self._copies.begin()), daemon=True)
        self._follower.start()

    def delete_older(self) -> None:
        """Delete what is older than the last checkpoint saved, on this machine, when every process has written that."""
        steps = on_disk(self._folder)[:-1] if ranks.local_rank() == 0 else []
        if steps:
            Thread(target=delete_on_disk, args=(self._folder, steps), daemon=True).start()

    def wait(self) -> None:
        """Wait until what was saved is stored."""
        if self._follower is not None:
            self._follower.join()
            self._follower = None

    def close(self) -> None:
        """Wait, and end the process that writes."""
        self.wait()
        if self._process is not None:
            # Orders end with the pipe, which is closed at the other end where the process was killed.
            with suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None

    def delete_all(self) -> None:
        """Delete every checkpoint, here and in storage: the finished model has been published."""
        self.close()
        try:
            open_storage(self._uri).delete("")
        except StorageError as error:
            log(f"train: the checkpoints of the finished training stay in storage: {error}")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _choose(self) -> tuple[int, bool]:
        local = max(self._local_steps(), default=0)
        stored = max(stored_steps(self._uri, self._owner), default=0)
        return (local, True) if local >= stored else (stored, False)

    def _local_steps(self) -> list[int]:
        # With several nodes another one may have been replaced: storage alone has all of a checkpoint.
        if self._owner.num_nodes > 1:
            return []
        return [step for step in on_disk(self._folder) if is_complete_on_disk(self._folder, step, self._owner)]

    def _fetch(self, step: int) -> None:
        """Fetch this process's share of the parts: every node needs all of them, whoever made them."""
        folder = step_folder(self._folder, step)
        if ranks.local_rank() == 0:
            log(f"train: fetching checkpoint {step} from {self._uri}")
        for rank in range(ranks.local_rank(), num_stored_parts(self._uri, step), ranks.num_local()):
            uri = rank_uri(self._uri, step, rank)
            if manifest := read_manifest(uri):
                fetch_files(uri, manifest, folder)

    def _written(self, step: int) -> list[str]:
        """Return the small files that the trainer has written itself."""
        folder = step_folder(self._folder, step)
        paths = [path for path in folder.rglob("*") if path.is_file() and not is_marker(path.name)]
        return [path.relative_to(folder).as_posix() for path in paths]

    def _below(self, path: Path | str) -> str:
        """Return a path relative to the checkpoint's folder, the first one below that of all checkpoints."""
        return Path(*Path(path).relative_to(self._folder).parts[1:]).as_posix()


def _start(descriptor: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "dice_core.training.checkpoint_process", str(descriptor)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[descriptor])


def _follow(process: "subprocess.Popen[bytes]", order: Order, under_way: IO[str]) -> None:
    """Give an order, and wait for its end. In a thread: a pipe may be full."""
    with under_way:
        try:
            assert process.stdin is not None and process.stdout is not None
            pickle.dump(order, process.stdin)
            process.stdin.flush()
            has_ended = process.stdout.readline() == ENDED
        except OSError:
            has_ended = False
        if not has_ended:
            # Its pipe is closed a moment before it is gone; the next checkpoint has another process.
            process.kill()
            process.wait()
            log(
                f"train: checkpoint {order.step} is not stored, for the process that writes it has ended "
                f"(exit code {process.returncode}): training goes on and stores the next one"
            )


class CheckpointCallback(TrainerCallback):
    """Decides, after each step, whether a checkpoint is due, for all processes alike, and has it saved.

    Due is one after so many minutes or steps, and when a pod is told to stop. While the one before is on its way the
    next one waits, and training does not. Must come after callbacks that add files to a checkpoint.
    """

    def __init__(self, store: CheckpointStore, copies: Copies, config: TrainingConfig) -> None:
        """Take the run's store, who says that this process is to stop, and how often to save."""
        self._store, self._copies, self._config = store, copies, config
        self._last = time.monotonic()
        self._is_due = self._has_ended = self._was_busy = False
        self._training: IO[str] | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Count time from here; from here on there is something to store."""
        self._last, self._training = time.monotonic(), self._copies.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the trainer save where a checkpoint is due; not after the last step, for the model itself follows."""
        control.should_save = False
        if state.global_step >= state.max_steps or self._has_ended:
            return
        wishes = [self._wants_one(state.global_step), self._copies.is_ending.is_set(), not self._store.is_idle]
        sums = ranks.total(torch.tensor(wishes, dtype=torch.float64).to(args.device))
        is_due, self._has_ended, is_busy = (bool(value) for value in sums.tolist())
        self._is_due |= is_due or self._has_ended
        if self._was_busy and not is_busy:
            self._store.delete_older()
        self._was_busy = is_busy
        control.should_save = self._is_due and not is_busy
        if self._has_ended and not control.should_save:
            # The one on its way is the newest there will be.
            self._release()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have it written and stored."""
        self._store.save(state.global_step)
        self._was_busy = True
        self._last, self._is_due = time.monotonic(), False
        if self._has_ended:
            self._release()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let no copy be cut off."""
        self._store.wait()
        self._release()

    def _wants_one(self, step: int) -> bool:
        """Return whether one is due by the clock of process 0, or by the step."""
        config = self._config
        by_step = bool(config.save_steps) and step % config.save_steps == 0
        by_time = ranks.rank() == 0 and time.monotonic() - self._last >= 60 * config.save_minutes
        return by_step or by_time

    def _release(self) -> None:
        if self._training is not None:
            self._training.close()
            self._training = None

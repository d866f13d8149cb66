"""`make board`: TensorBoard on the curves of a run, or of all runs, as they grow.

TensorBoard reads files of this machine: the event files that trainings keep in storage are copied below a folder, and
again every few seconds what has been added to them. It is installed for this command alone (requirements/board.lock).
"""

import argparse
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

from dice_core.child_processes import end_with_parent
from dice_core.progress import log
from dice_core.settings.base import ConfigError
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import MissingObjectError, Storage, StorageError
from dice_core.tracking.tensorboard import EVENTS_FILE, FOLDER
from pipelines.kfp.submit import chosen_root, root_of_cluster

_HOST = "127.0.0.1"
# A listing of many runs takes a while: it is a tenth of the time at most.
_SHARE_OF_LISTING = 10


def board(options: argparse.Namespace) -> int:
    """Serve the curves until Ctrl-C; return TensorBoard's exit code if it ends before."""
    root = chosen_root(options.root, partial(root_of_cluster, options))
    folder = Path(options.folder) / sha256(f"{root}\n{options.run}".encode()).hexdigest()[:12]
    copies = CurveCopies(root, options.run, folder)
    copies.update()
    copies.require_run()
    where = f"run {options.run}" if options.run else f"all runs below {layout.join(root, 'runs')}"
    log(f"board: {copies.num_files} trainings of {where}; http://{_HOST}:{options.port}")
    command = [options.python, "-m", "tensorboard.main", f"--logdir={folder}", f"--host={_HOST}"]
    command += [f"--port={options.port}", f"--reload_interval={options.seconds}"]
    # TensorFlow's own lines say nothing that a person here would need.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen(command, env=environment, preexec_fn=partial(end_with_parent, os.getpid())) as process:
        return serve(process, copies.update, options.seconds)


def serve(process: "subprocess.Popen[bytes]", update: Callable[[], None], seconds: float) -> int:
    """Update the copies for as long as a process runs; return its exit code, 0 after Ctrl-C."""
    pause = seconds
    try:
        while True:
            try:
                return process.wait(pause)
            except subprocess.TimeoutExpired:
                start = time.monotonic()
                _updated(update)
                pause = max(seconds, _SHARE_OF_LISTING * (time.monotonic() - start))
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0


def _updated(update: Callable[[], None]) -> None:
    try:
        update()
    except StorageError as error:
        log(f"board: the curves shown are those of before: {error}")


class CurveCopies:
    """Copies of event files, in folders called by run and place: what TensorBoard calls the curves."""

    def __init__(self, root: str, run: str, folder: Path) -> None:
        """Take where all runs are, the name of one (empty: all), and a folder that is this object's alone."""
        if run:
            layout.check_name(run, "run")
        self._uri, self._run, self._folder = layout.join(root, "runs"), run, folder
        self.num_files = 0
        self._num_objects = 0

    def update(self) -> None:
        """Copy what is new, and delete what is no longer in storage.

        Raises:
            StorageError: the storage cannot be read.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        storage = open_storage(self._uri)
        objects = storage.list(f"{self._run}/" if self._run else "")
        suffix = f"/{FOLDER}/{EVENTS_FILE}"
        found = {entry.key: entry.size for entry in objects if entry.key.endswith(suffix)}
        paths = {key: self._folder / key.removesuffix(suffix) / EVENTS_FILE for key in found}
        for key, path in paths.items():
            if not path.is_file() or path.stat().st_size != found[key]:
                _copy(storage, key, path)
        for path in set(self._folder.rglob(EVENTS_FILE)) - set(paths.values()):
            path.unlink()
        self._num_objects, self.num_files = len(objects), len(found)

    def require_run(self) -> None:
        """Check that the run has left something.

        Raises:
            ConfigError: it has not.
        """
        if not self._num_objects:
            what = f"run {self._run!r}" if self._run else "any run"
            raise ConfigError(
                f"board: nothing of {what} is at {self._uri}: make status lists the runs, and DICE_ROOT names where "
                "they are"
            )


def _copy(storage: Storage, key: str, path: Path) -> None:
    """Bring a copy up to date.

    TensorBoard keeps the file open and reads what is appended: only a file that was begun anew is replaced.
    """
    new = path.with_name("unfinished")
    try:
        storage.download(key, new)
    except MissingObjectError:
        # Deleted since the listing.
        return
    data, before = new.read_bytes(), path.read_bytes() if path.is_file() else b""
    if before and data.startswith(before):
        with path.open("ab") as stream:
            stream.write(data[len(before) :])
        new.unlink()
    else:
        new.replace(path)

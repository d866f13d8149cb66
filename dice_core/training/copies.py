"""What a node still copies to storage, and a process that ends no sooner than that is complete when it is told to stop.

All processes of a node know of it by a lock on a file: one that ended at once would make the others fail, and with
them the copy. Knows neither checkpoints nor storage. Loads no torch.
"""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dice_core.progress import log

_EXIT_CODE = 128 + signal.SIGTERM


class Copies:
    """The copies under way on this node: shared locks on a file."""

    def __init__(self, path: Path) -> None:
        """Take the file, the same one for all processes of a job on a node."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, path.open("w")
        self.is_ending = threading.Event()
        """No copy is to begin any more."""

    def begin(self) -> IO[str]:
        """Return a lock that lasts until it is closed: a copy is under way, or wanted."""
        lock = self._path.open("w")
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock

    @contextmanager
    def end_process_on_sigterm(self) -> Iterator[None]:
        """Let SIGTERM end this process once no copy is under way on the node; until then training goes on."""
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread alone: whoever runs this in another one stops it.
            yield
            return
        # Not the handler itself: it would run when the main thread is back from a collective, perhaps never.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), signal.signal(signal.SIGTERM, _ignore)
        watcher = threading.Thread(target=self._end_on_sigterm, args=(reader,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before[0])
            signal.signal(signal.SIGTERM, before[1])
            os.close(writer)
            watcher.join()

    def _end_on_sigterm(self, reader: int) -> None:
        while received := os.read(reader, 64):
            if signal.SIGTERM in received:
                self._end()
        os.close(reader)

    def _end(self) -> None:
        self.is_ending.set()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Of the processes of a node, which torchrun numbers, one speaks.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                log("train: told to stop; what is being stored is finished first")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        # The others of the node wait for it too.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os._exit(_EXIT_CODE)


def _ignore(number: int, frame: object) -> None:
    """Leave it to the thread that waits for the signal's number."""

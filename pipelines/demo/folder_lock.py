"""A folder that one process at a time may use, whose lock outlives no process. Waits for an owner that is dying."""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

WAIT_SECONDS = 10.0
"""For a lock whose owner is gone: the threads of a killed process hold its files a moment longer than the process is
seen, seconds on a busy machine."""
GRACE_SECONDS = 1.0
"""For one whose owner is alive: it may be about to be killed, together with what started it."""
_PAUSE_SECONDS = 0.05


class FolderInUseError(RuntimeError):
    """Another process uses the folder. `owner` is its number, or `just starting`."""

    def __init__(self, owner: str) -> None:
        """Take the owner."""
        super().__init__(f"in use by process {owner}")
        self.owner = owner


@contextmanager
def folder_lock(path: Path, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[IO[str]]:
    """Yield a locked file for the length of a block; a child that inherits it keeps the lock for as long as it lives.

    The owner writes its number into the file: write_owner.

    Args:
        path: of the file, made if it does not exist.
        wait_seconds: for an owner that is gone. One that is alive is waited for GRACE_SECONDS at most.

    Raises:
        FolderInUseError: the owner lives, or its files stay open.
    """
    with path.open("a+") as lock:
        _acquire(lock, path, wait_seconds)
        yield lock


def write_owner(lock: IO[str], pid: int) -> None:
    """Write the number of the process that the lock is for."""
    lock.truncate(0)
    lock.write(str(pid))
    lock.flush()


def _acquire(lock: IO[str], path: Path, wait_seconds: float) -> None:
    start, has_spoken = time.monotonic(), False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
        waited = time.monotonic() - start
        if waited > (min(GRACE_SECONDS, wait_seconds) if not owner or _is_alive(int(owner)) else wait_seconds):
            raise FolderInUseError(owner or "just starting")
        if waited > 1 and not has_spoken:
            has_spoken = True
            print(f"{path.parent}: process {owner} is ending, waiting for its files", file=sys.stderr, flush=True)
        time.sleep(_PAUSE_SECONDS)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # The first thread of a killed process may be dead while others still end.
    stat = Path(f"/proc/{pid}/stat")
    return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] not in "ZX"

"""Lines that tell a person what a stage is doing. A batch job's log is its only screen: one line an event, flushed."""

import os
import sys
import time
from contextlib import suppress


def log(message: str) -> None:
    """Print a line with the time of day to standard error.

    Where nobody reads it any more, the work goes on: the last a launcher does in a pod is done when its reader is gone.
    The line and its end are one write: print makes two, and another thread's line comes in between.
    """
    with suppress(BrokenPipeError):
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {message}\n")
        sys.stderr.flush()


def debug(message: str) -> None:
    """Print such a line where DICE_DEBUG is set."""
    if os.environ.get("DICE_DEBUG"):
        log(message)


def one_line(error: BaseException) -> str:
    """Return the first line of an error: what follows it, such as the last lines of each process, was shown before."""
    if isinstance(error, ImportError):
        return f"{error}: this stage runs where that package is installed, such as in its image"
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Throttle:
    """Let a line through at most once in so many seconds."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def is_due(self) -> bool:
        """Return whether enough time has passed since the last time this was true."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class Progress:
    """Log lines such as `generate shard 1/8: 512 of 1250 prompts`, at most one in ten seconds."""

    def __init__(self, what: str, unit: str) -> None:
        """Take what is done, and what is counted."""
        self._what, self._unit, self._throttle = what, unit, Throttle()

    def __call__(self, num_done: int, num_all: int, *_: object) -> None:
        """Take the counts of now."""
        if num_done == num_all or self._throttle.is_due():
            log(f"{self._what}: {num_done} of {num_all} {self._unit}")

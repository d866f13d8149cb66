"""Lines that tell a person what a stage is doing. A batch job's log is its only screen: one line an event, flushed.

A long work counts (Progress), and says how fast it goes and how long it still takes. Whatever else lasts is told by
never_silent, which knows from `doing` what it is.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class _Now:
    """What the main thread of this process is at, since when, and when somebody last spoke."""

    activity: str = ""
    since: float = 0.0
    spoken: float = field(default_factory=time.monotonic)

    def begin(self, activity: str) -> None:
        """Take what is being done from now on. What other threads do is done beside it."""
        if threading.current_thread() is threading.main_thread():
            self.activity, self.since = activity, time.monotonic()


_now = _Now()


def log(message: str) -> None:
    """Print a line with the time of day to standard error.

    Where nobody reads it any more, the work goes on: the last a launcher does in a pod is done when its reader is gone.
    The line and its end are one write: print makes two, and another thread's line comes in between.
    """
    heard()
    with suppress(BrokenPipeError):
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {message}\n")
        sys.stderr.flush()


def heard() -> None:
    """Take note that a line has just been written, such as one of another process."""
    _now.spoken = time.monotonic()


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what the block does if it lasts: "starting vLLM"."""
    before = _now.activity
    _now.begin(what)
    try:
        yield
    finally:
        _now.begin(before)


@contextmanager
def never_silent(stage: str, seconds: float = 12.0) -> Iterator[None]:
    """Log what is being done whenever nothing has been said for so long.

    Args:
        stage: that the block does.
        seconds: of silence; checked twelve times as often.
    """
    ended = threading.Event()
    _now.begin("")
    heard()

    def speak() -> None:
        while not ended.wait(seconds / 12):
            if time.monotonic() - _now.spoken >= seconds:
                what = _now.activity or "at work"
                title = what if what.startswith(stage) else f"{stage}: {what}"
                log(f"{title}, for {_duration(time.monotonic() - _now.since)} so far")

    thread = threading.Thread(target=speak, daemon=True, name="dice-progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def debug(message: str) -> None:
    """Print such a line where DICE_DEBUG is set."""
    if os.environ.get("DICE_DEBUG"):
        log(message)


def one_line(error: BaseException) -> str:
    """Return the first line of an error: what follows it, such as the last lines of each process, was shown before."""
    if isinstance(error, ImportError):
        return f"{error}: this stage runs where that package is installed, such as in its image"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def without_password(address: str) -> str:
    """Return an address without the user and the password before its host; it may lack http://."""
    scheme, marks, rest = address.rpartition("://")
    # A password may hold a slash that nobody wrote as %2F.
    return scheme + marks + rest.rpartition("@")[2]


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
    """Log lines such as `generate shard 1/8: 512 of 1250 prompts, 3.2/s, 4 min left`, at most one in ten seconds.

    The pace is that of this attempt: what an earlier one did, and what was done when the first count came, is no work
    of it.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        *,
        num_all: int | None = None,
        tells_end: bool = True,
        throttle: Throttle | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what is done, and how it is counted.

        Args:
            what: begins each line.
            unit: of the counts.
            num_all: with the work of earlier attempts, where the counts leave that out.
            tells_end: whether the end is a line too, however short the work.
            throttle: lets lines through; one in ten seconds by default.
            clock: returns seconds.
        """
        self._what, self._unit, self._num_all, self._tells_end = what, unit, num_all, tells_end
        self._throttle, self._clock = throttle or Throttle(), clock
        self._first: tuple[float, int] | None = None

    def begin(self) -> "Progress":
        """Let silence be told with this work, whose first count may be long in coming."""
        _now.begin(self._what)
        return self

    def __call__(self, num_done: int, num_all: int, *_: object) -> None:
        """Take the counts of now."""
        num_before, is_end = (self._num_all or num_all) - num_all, num_done == num_all
        counts = f"{self._what}: {num_before + num_done} of {num_before + num_all} {self._unit}"
        self._first = self._first or (self._clock(), num_done)
        _now.begin("" if is_end else counts)
        if self._throttle.is_due() or (is_end and self._tells_end):
            start, num_at_start = self._first
            log(counts + pace(num_done - num_at_start, self._clock() - start, num_all - num_done))


def pace(num_done: int, seconds: float, num_left: int) -> str:
    """Return what follows a count: `, 3.2/s, 4 min left`; empty where nothing was done yet that tells."""
    if num_done <= 0 or seconds <= 0:
        return ""
    left = f", {_duration(num_left * seconds / num_done)} left" if num_left > 0 else ""
    return f", {_rate(num_done / seconds)}{left}"


def _rate(per_second: float) -> str:
    units = {"s": per_second, "min": per_second * 60, "h": per_second * 3600}
    unit = next((unit for unit, number in units.items() if number >= 1), "h")
    return f"{units[unit]:,.{0 if units[unit] >= 10 else 1}f}/{unit}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

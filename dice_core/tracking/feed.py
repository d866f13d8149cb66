"""What a process tells a tracker, sent by a thread of its own: a tracker that is slow or away costs the work nothing.

    put -> at most so many lines wait -> a thread sends them, a batch every few seconds

A full queue drops its oldest lines and counts them. Knows no tracker: each is a file of its own.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from dice_core.progress import log, one_line

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How tracked work ends, in MLflow's words."""

_END_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0
# The time that sending takes is a twentieth of all time, at most: a long file is sent less often.
_SHARE_OF_SENDING = 20


class TrackerError(RuntimeError):
    """A tracker that did not take what it was sent. One line, without credentials."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        """Take whether another try would meet the same."""
        super().__init__(message)
        self.is_final = is_final


@dataclass(frozen=True)
class Line:
    """Some numbers of one step, all of them finite."""

    step: int
    values: Mapping[str, float]
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""


class Tracker(Protocol):
    """Somebody who keeps curves. Called by one thread. Every method may raise TrackerError."""

    title: str
    """What begins its lines in the log: its name, and its address without credentials."""
    seconds: float
    """Between two batches."""

    def begin(self) -> None:
        """Make ready; called until it succeeds."""
        ...

    def send(self, lines: Sequence[Line]) -> None:
        """Take some lines, in order; called with the same lines again after an error."""
        ...

    def end(self, status: Status, summary: Mapping[str, float]) -> None:
        """Take the end of the work and the numbers that describe it."""
        ...


class Feed:
    """The lines on their way to one tracker."""

    def __init__(self, tracker: Tracker, *, max_lines: int = 20_000) -> None:
        """Take a tracker; it is spoken to at once, in a thread."""
        self._tracker = tracker
        self._lines: deque[Line] = deque(maxlen=max_lines)
        self._changed = threading.Condition()
        self._num_dropped = self._num_under_way = 0
        self._status: Status | None = None
        self._summary: Mapping[str, float] = {}
        self._asked = 0.0
        self._has_begun = self._is_away = self._has_given_up = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="dice-tracking")
        self._thread.start()

    def put(self, line: Line) -> None:
        """Add a line; takes microseconds."""
        with self._changed:
            # A full deque lets its oldest line go.
            self._num_dropped += len(self._lines) == self._lines.maxlen
            self._lines.append(line)

    def end(
        self,
        status: Status,
        summary: Mapping[str, float] | None = None,
        *,
        seconds: float = _END_SECONDS,
        tells: bool = True,
    ) -> None:
        """Send what is left, and how the work ended. A tracker that is away, or silent for so long, is not waited for.

        Args:
            status: of the work.
            summary: the numbers that describe it.
            seconds: that it may take, with those that the tracker has been thinking already.
            tells: whether a line says what was not sent.
        """
        with self._changed:
            self._status, self._summary = status, summary or {}
            self._changed.notify_all()
            asked = self._asked
        silent = time.monotonic() - asked if asked else 0.0
        # The thread goes on beside what follows, and ends with the process.
        self._thread.join(0.0 if self._is_away else max(0.0, seconds - silent))
        num_missing = self._num_dropped + self._num_under_way + len(self._lines)
        if num_missing and tells and not self._has_given_up:
            log(f"{self._tracker.title}: {num_missing} lines of metrics were not sent")

    def _work(self) -> None:
        pause, failures = 0.0, 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._status is not None, pause)
                status = self._status
            start = self._asked = time.monotonic()
            try:
                self._send(status)
                failures = 0
                self._heard()
            except Exception as error:
                failures += 1
                self._failed(error)
            self._asked = 0.0
            if self._has_given_up or status is not None:
                return
            taken = time.monotonic() - start
            backoff = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (failures - 1)) if failures else 0.0
            pause = max(self._tracker.seconds, backoff, _SHARE_OF_SENDING * taken if not failures else 0.0)

    def _send(self, status: Status | None) -> None:
        if not self._has_begun:
            self._tracker.begin()
            self._has_begun = True
        with self._changed:
            lines = list(self._lines)
            self._num_under_way = len(lines)
            self._lines.clear()
        try:
            if lines:
                self._tracker.send(lines)
        except BaseException:
            self._put_back(lines)
            raise
        self._num_under_way = 0
        if status is not None:
            self._tracker.end(status, self._summary)

    def _put_back(self, lines: Sequence[Line]) -> None:
        with self._changed:
            # Those that came meanwhile are newer: they stay.
            room = (self._lines.maxlen or 0) - len(self._lines)
            kept = lines[len(lines) - min(room, len(lines)) :]
            self._num_dropped += len(lines) - len(kept)
            self._num_under_way = 0
            self._lines.extendleft(reversed(kept))

    def _heard(self) -> None:
        if self._is_away:
            log(f"{self._tracker.title}: answers again")
        self._is_away = False

    def _failed(self, error: Exception) -> None:
        # Whatever a tracker's client raises, the work goes on.
        self._has_given_up = not isinstance(error, TrackerError) or error.is_final
        if self._has_given_up:
            log(f"{self._tracker.title}: {one_line(error)}: nothing more is sent there, the work goes on")
        elif not self._is_away:
            log(f"{self._tracker.title}: {one_line(error)}: the work goes on, and what it measures is sent later")
        self._is_away = True

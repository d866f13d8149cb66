"""How a run is followed: each change of a task's state, and once a minute what the stages at work say."""

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from pipelines.kfp.api import KfpError
from pipelines.kfp.run_view import Observer, RunView, exit_code
from pipelines.kfp.status import in_words
from pipelines.kfp.task_states import ENDED, UNKNOWN, WAITING


@dataclass(frozen=True)
class Pace:
    """How often to look, in seconds. The tests look more often."""

    poll: float = 10.0
    progress: float = 60.0
    """What stages at work say is shown as often."""
    patience: float = 600.0
    """A server that does not answer for so long ends it; the run goes on."""


def follow(observer: Observer, name: str, pace: Pace | None = None) -> int:
    """Print each change of a task's state until the run is over; return 0 if it succeeded.

    A connection that breaks for a while (a port-forward that is restarted) does not end it.

    Args:
        observer: of the run.
        name: what the person calls it.
        pace: how often to look.
    """
    screen = _Screen(observer, pace or Pace())
    try:
        for view in _looks(observer, pace or Pace()):
            screen.show(view)
    except KeyboardInterrupt:
        print(f"\nthe run goes on; stop it: make cancel RUN={shlex.quote(name)}", file=sys.stderr)
        return 130
    print(f"run {name}: {in_words(view, name)}")
    if view.state != "SUCCEEDED":
        # KFP's own name of a recurring run has spaces.
        word = shlex.quote(name)
        print(f"why: make logs RUN={word}; make retry RUN={word} continues it", file=sys.stderr)
    return exit_code(view)


class _Screen:
    """What was printed of a run, and what is new."""

    def __init__(self, observer: Observer, pace: Pace) -> None:
        self._observer, self._pace = observer, pace
        self._shown: dict[str, str] = {}
        self._said: dict[str, str] = {}
        self._last = time.monotonic()

    def show(self, view: RunView) -> None:
        """Print what has another state than at the last look; after a while, what those at work say, or wait for."""
        if not view.is_over:
            self._say("run", view.state)
        num_done = sum(task.state in ENDED for task in view.tasks)
        for task in view.tasks:
            if task.state not in (WAITING, UNKNOWN) and self._shown.get(task.label) != task.state:
                self._print(f"[{num_done:2d}/{len(view.tasks)}] {task}")
            self._shown[task.label] = task.state
        if not view.is_over and time.monotonic() - self._last >= self._pace.progress:
            self._last = time.monotonic()
            for label, line in self._observer.progress(view):
                self._say(label, line)
            for name, reason in self._observer.waiting():
                self._say(name, f"does not run yet: {reason or 'no reason given'}")

    def _say(self, who: str, what: str) -> None:
        """Print what was not the last thing that somebody said."""
        if self._said.get(who) != what:
            self._said[who] = what
            self._print(f"        {who}: {what}")

    def _print(self, text: str) -> None:
        print(f"{datetime.now():%H:%M:%S} {text}", flush=True)


def _looks(observer: Observer, pace: Pace) -> Iterator[RunView]:
    """Yield the run again and again, at last when it is over."""
    lost_since = 0.0
    while True:
        try:
            view = observer.look()
        except KfpError as error:
            if not lost_since:
                lost_since = time.monotonic()
                print(f"pipelines: {error}; trying again", file=sys.stderr)
            elif time.monotonic() - lost_since > pace.patience:
                raise
        else:
            lost_since = 0.0
            yield view
            if view.is_over:
                return
        time.sleep(pace.poll)

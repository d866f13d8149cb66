"""Requests that a server takes and does not answer: a line says so while they last.

outages.py decides how long they may last.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from dice_core.progress import log
from dice_core.storage.s3_answers import BEFORE_PARSE


class Waits:
    """The requests of one client that have no answer yet. Safe to use from several threads."""

    def __init__(self, server: str, tell_after: float) -> None:
        """Take what messages call the server, and after how many seconds a wait is told, and told again."""
        self._server, self._tell_after = server, tell_after
        self._lock, self._is_watched = threading.Lock(), False
        self._awaited: dict[int, tuple[float, str]] = {}
        """By thread: since when, and what."""

    def watch(self, client: Any) -> None:
        """Follow the requests of a client from now on."""
        events = client.meta.events
        events.register("before-send.s3", self._sent, unique_id="dice-sent")
        events.register(BEFORE_PARSE, self._answered, unique_id="dice-answered")
        events.register("needs-retry.s3", self._answered, unique_id="dice-failed")

    @contextmanager
    def awaiting(self, what: str) -> Iterator[None]:
        """Follow a wait of this thread that is no request, such as that for the rest of an answer."""
        self._begin(what)
        try:
            yield
        finally:
            self._answered()

    def _sent(self, *, request: Any, **_: Any) -> None:
        self._begin(f"{request.method} {urlsplit(request.url).path}")

    def _begin(self, what: str) -> None:
        with self._lock:
            self._awaited[threading.get_ident()] = (time.monotonic(), what)
            if self._is_watched:
                return
            self._is_watched = True
        threading.Thread(target=self._tell, daemon=True, name="dice-waits").start()

    def _answered(self, **_: Any) -> None:
        with self._lock:
            self._awaited.pop(threading.get_ident(), None)

    def _tell(self) -> None:
        """Say which wait is the longest, again and again; end when nothing is awaited."""
        told = 0.0
        while True:
            time.sleep(self._tell_after / 4)
            with self._lock:
                if not self._awaited:
                    self._is_watched = False
                    return
                since, what = min(self._awaited.values())
            now = time.monotonic()
            if now - max(since, told) >= self._tell_after:
                told = now
                log(f"storage: {self._server} has not answered {what} for {now - since:.0f} s: still waiting")

"""A store that is away for a while: which faults pass, how long requests wait for it, and what is said meanwhile.

Hooks into boto3's retries, so that one part of a file waits and not the whole file starts anew; s3.py has the requests.
A store that has answered this process once is waited for. One that never has is waited for in a pod alone, whose
settings were checked: for a person, a wrong endpoint is an error within seconds.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dice_core.progress import log
from dice_core.storage.s3_answers import PASSING_STATUS

_PASSING_CODES = {"SlowDown", "RequestTimeout"}
_FIRST_FAULT = "dice_first_fault"
# A blip of a second is no news, and a first contact is not tried more often.
_NUM_QUIET_TRIES, _NUM_QUICK_TRIES = 2, 4
# Requests of one outage fail at most so far apart: one waits for its answer for half as long.
_SAME_OUTAGE_SECONDS = 120.0

_interrupted = threading.Event()


@dataclass(frozen=True)
class StorePatience:
    """How long requests wait for a store that is away, in seconds. Tests take less."""

    give_up: float = 180.0
    """A pod whose node is drained, or that is killed for want of memory, is back within two minutes."""
    first_pause: float = 0.5
    longest_pause: float = 15.0
    answer: float = 60.0
    """For the answer to one request; S3 puts a large file together before it answers."""
    tell_after: float = 10.0
    """After which a line says that there is no answer yet, or how much of a file has moved."""

    def pause(self, num_tries: int) -> float:
        """Return how long to wait after so many tries: twice as long each time."""
        return doubled(self.first_pause, self.longest_pause, num_tries)


def doubled(first: float, longest: float, num_tries: int) -> float:
    """Return a pause that doubles with each try, from the first on, up to the longest. In seconds."""
    return min(longest, first * 2.0 ** min(num_tries - 1, 30))


@contextmanager
def waiting_ends_with_interrupt() -> Iterator[None]:
    """Let the requests of all threads wait no more once Ctrl-C ends the block: the process is about to end."""
    try:
        yield
    except KeyboardInterrupt:
        _interrupted.set()
        raise


class Outages:
    """What one client knows of its server. Safe to use from several threads."""

    def __init__(self, server: str, patience: StorePatience) -> None:
        """Take what messages call the server, and how long to wait for it."""
        self._server, self._patience = server, patience
        self._lock = threading.Lock()
        self._has_answered, self._is_told = False, False
        self._began, self._newest_fault = 0.0, 0.0

    def watch(self, client: Any) -> None:
        """Decide from now on which requests of a client are made again. Its own retries have to be off."""
        client.meta.events.register("needs-retry.s3", self._after_try, unique_id="dice-outages")

    @property
    def seconds_waited_for(self) -> float:
        """How long a request waits before it fails; 0: where a first contact fails within seconds."""
        return self._patience.give_up if self._has_answered or "KUBERNETES_SERVICE_HOST" in os.environ else 0.0

    def _after_try(
        self, *, response: Any, caught_exception: Exception | None, attempts: int, request_dict: Any, **_: Any
    ) -> float | None:
        """Wait and return 0 to have a request made again; None: what it has got is its answer."""
        context = request_dict["context"]
        fault, is_silent = _passing_fault(response, caught_exception), _is_timeout(caught_exception)
        if not fault:
            if response is not None:
                self._say_back(context.get(_FIRST_FAULT))
            return None
        if not self.seconds_waited_for and (is_silent or attempts >= _NUM_QUICK_TRIES):
            return None
        pause = self._patience.pause(attempts)
        if not self._may_wait(context.setdefault(_FIRST_FAULT, time.monotonic()), attempts, pause):
            return None
        # Of a first contact the error tells, within seconds.
        if attempts > _NUM_QUIET_TRIES and self.seconds_waited_for:
            self._say_away(fault)
        return None if _interrupted.wait(pause) else 0.0

    def _may_wait(self, first_fault: float, num_tries: int, pause: float) -> bool:
        now = time.monotonic()
        with self._lock:
            if now - self._newest_fault > _SAME_OUTAGE_SECONDS or not self._began:
                self._began = first_fault
            self._newest_fault = now
            began, limit = self._began, self._patience.give_up
        # A server that fails at one object alone answers the others meanwhile. After a request that has given up, the
        # next ones do not wait as long again: a broken upload is still to be cleaned up.
        has_long_waited = now + pause - first_fault > limit
        is_long_away = now + pause - began > limit and num_tries >= _NUM_QUICK_TRIES
        if has_long_waited or is_long_away:
            self._is_told = False
            return False
        return True

    def _say_away(self, fault: str) -> None:
        with self._lock:
            is_news, self._is_told = not self._is_told, True
        if is_news:
            log(f"storage: {self._server} {fault}: trying again for up to {self._patience.give_up:.0f} s")

    def _say_back(self, first_fault: float | None) -> None:
        with self._lock:
            self._has_answered, self._began = True, 0.0
            is_news = first_fault is not None and self._is_told
            self._is_told = self._is_told and not is_news
        if is_news and first_fault is not None:
            log(f"storage: {self._server} answers again after {time.monotonic() - first_fault:.0f} s")


def _passing_fault(response: Any, error: Exception | None) -> str:
    """Return what is wrong with the server for now; empty: nothing, or nothing that passes."""
    # Takes a while to import: what touches no S3 does not wait for it.
    from botocore import exceptions as boto_errors

    if isinstance(error, boto_errors.SSLError):
        return ""
    if isinstance(error, boto_errors.EndpointConnectionError | boto_errors.ConnectTimeoutError):
        return "cannot be reached"
    if isinstance(error, boto_errors.ConnectionError | boto_errors.HTTPClientError):
        return "does not answer"
    if response is None:
        return ""
    status, code = response[0].status_code, str(response[1].get("Error", {}).get("Code", ""))
    passes = status in PASSING_STATUS or code in _PASSING_CODES
    return f"answers {status} {code.removeprefix(str(status))}".rstrip() if passes else ""


def _is_timeout(error: Exception | None) -> bool:
    from botocore import exceptions as boto_errors

    return isinstance(error, boto_errors.ConnectTimeoutError | boto_errors.ReadTimeoutError)

"""Runs a command and leaves no process of it behind, whatever becomes of the command, of its caller, or of both.

    python -m pipelines.demo.process_tree CALLER_PID STOP_SECONDS COMMAND...

A process of its own between demo.py and the run, because a caller that was killed can clean up no more. Linux tells
it when the caller is gone, and gives it the processes whose parents ended before them. Ends with the command's exit
status: 128 and the number of the signal if one ended it, as in a shell. one_stop_request is for the caller itself.
"""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import psutil

from dice_core.child_processes import end_with_parent

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.1
# SIGHUP comes when the terminal is closed.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def one_stop_request() -> Iterator[None]:
    """Make Ctrl-C, `kill` and the end of the terminal one KeyboardInterrupt: more must not disturb the clean-up."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    # What is ignored already stays so: that is how nohup works.
    heeded = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str]) -> int:
    """Run the command until it ends, a SIGTERM arrives or the caller is gone; then end all that it started."""
    caller, stop_seconds, *command = arguments
    stops: list[int] = []
    # Only noted: an exception could come in the middle of the clean-up.
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
    adopt_orphans()
    end_with_parent(int(caller), signal.SIGTERM)
    if stops:
        return 128 + signal.SIGTERM
    process = subprocess.Popen(command)
    while process.poll() is None and not stops:
        time.sleep(_POLL_SECONDS)
    exit_code = process.poll()
    stop_descendants(float(stop_seconds))
    if exit_code is None:
        return 128 + signal.SIGTERM
    return exit_code if exit_code >= 0 else 128 - exit_code


def adopt_orphans() -> None:
    """Make processes whose parents end before them children of this one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def stop_descendants(seconds: float, *, are_told: bool = False) -> None:
    """End all processes below this one: politely at first, by force after some seconds.

    Args:
        seconds: for each way of asking.
        are_told: they have got Ctrl-C too, and may end of themselves for so long.
    """
    this, asked = psutil.Process(), set[psutil.Process]()
    if are_told:
        psutil.wait_procs(this.children(recursive=True), timeout=seconds)
    for stop in ("terminate", "kill"):
        deadline = time.monotonic() + seconds
        # Looked up again each time: a process may start others until it is gone.
        while (processes := this.children(recursive=True)) and time.monotonic() < deadline:
            for process in processes:
                if stop == "terminate" and process in asked:
                    continue
                asked.add(process)
                try:
                    getattr(process, stop)()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(processes, timeout=_POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

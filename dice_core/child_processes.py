"""Processes that end with the process that started them, also when that one is killed. Linux alone can tell them.

A function can run in such a process (run_in_child): what it loads and holds, CUDA's context among it, is gone with it.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import FrameType

_PR_SET_PDEATHSIG = 1
_MAX_MESSAGE = 10_000


class ChildError(RuntimeError):
    """A function failed in its process, which has shown the traceback. The message is its error's."""


class ChildKilledError(RuntimeError):
    """A signal ended the process of a function."""

    def __init__(self, number: int) -> None:
        """Take the number of the signal."""
        super().__init__(f"its process was ended by {signal.Signals(number).name}")
        self.number = number


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent is gone. A child calls it first of all.

    Between fork and exec (subprocess's preexec_fn) the wish stays with the program that is executed.

    Args:
        parent: its process id. The parent may have gone before Linux was asked: then the signal comes at once.
        number: of the signal.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def run_in_child(work: Callable[[], object], *, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Run a function to its end in a process that is forked from this one, so that nothing is loaded anew.

    To be called from the main thread, before this process has used CUDA: a forked process then cannot.

    Args:
        work: its effects outside of the process are all that stays.
        meanwhile: what this process does beside it.

    Raises:
        ChildError: the function failed.
        ChildKilledError: a signal ended its process, and this one was sent none. One that was sent SIGTERM passes it on
            and ends by it when the function's process has ended.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(work, sender, os.getpid()))
    with _told_to_end_together(child):
        _start(child)
        sender.close()
        try:
            meanwhile()
            child.join()
        finally:
            if child.is_alive():
                child.terminate()
                child.join()
    if child.exitcode and child.exitcode < 0:
        raise ChildKilledError(-child.exitcode)
    if child.exitcode:
        raise ChildError(_received(receiver) or f"its process ended with exit code {child.exitcode}")


def _start(child: BaseProcess) -> None:
    """Start a process; a SIGTERM that comes meanwhile is taken when both can."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _work(work: Callable[[], object], sender: Connection, parent: int) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        work()
    except Exception as error:
        # The pipe takes so much before anybody reads it.
        sender.send(str(error)[:_MAX_MESSAGE])
        raise


def _received(receiver: Connection) -> str:
    # A process that outlives the function's may hold the other end open.
    try:
        return str(receiver.recv()) if receiver.poll() else ""
    except EOFError:
        return ""


@contextmanager
def _told_to_end_together(child: BaseProcess) -> Iterator[None]:
    """Pass SIGTERM on to a process, and end by it when that one has ended."""
    received = list[int]()

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if received:
            signal.raise_signal(received[0])

"""Processes that end with the process that started them, also when that one is killed. Linux alone can tell them."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


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

"""Ends a worker with the torchrun that started it."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
# torchrun sets it for its workers.
_TORCHRUN_ID = "TORCHELASTIC_RUN_ID"


def die_with_torchrun() -> None:
    """Ask Linux to kill this process when the torchrun that started it is gone; a worker calls it first of all.

    torchrun starts each worker in a session of its own, which no signal to torchrun's group reaches: a torchrun that is
    killed, by the launcher or for want of memory, would leave its workers training and holding their GPUs.
    """
    if _TORCHRUN_ID not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It went before Linux knew of the wish.
        os.kill(os.getpid(), signal.SIGKILL)

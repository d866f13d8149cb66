"""Ctrl-C ends a command with one line, whatever it comes in the middle of: imports, C code, clean-up in a destructor.

Loads nothing: commands call it before they import anything else.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_pressed: list[int] = []

LINE = "{}: stopped; the same command goes on"
"""What a program tells, by its name, that takes its work up again."""
EXIT_CODE = 130
"""128 and the number of the signal, as in a shell."""


@contextmanager
def told_in_one_line(line: str) -> Iterator[None]:
    """Make Ctrl-C end the block with a line and an exit code, even where code inside makes another error of it.

    Args:
        line: what a person reads.

    Raises:
        SystemExit: Ctrl-C was pressed.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _pressed.append(number)
        raise KeyboardInterrupt

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:
        signal.signal(signal.SIGINT, stop)
        _keep_quiet()
    try:
        yield
    except BaseException as error:
        if not _pressed and not isinstance(error, KeyboardInterrupt):
            raise
        print(line, file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _pressed.clear()


def is_pressed() -> bool:
    """Return whether Ctrl-C has been pressed in a block of told_in_one_line."""
    return bool(_pressed)


def _keep_quiet() -> None:
    """Let Python not tell of the interrupt where it cannot be raised, as in destructors and other threads."""
    unraisable, in_thread = sys.unraisablehook, threading.excepthook

    def hide(kind: type[BaseException] | None, show: Any, details: Any) -> None:
        if not _pressed or not (kind and issubclass(kind, KeyboardInterrupt | ImportError)):
            show(details)

    sys.unraisablehook = lambda details: hide(details.exc_type, unraisable, details)
    threading.excepthook = lambda details: hide(details.exc_type, in_thread, details)

"""What a client library's error about a connection comes down to, in a few words."""

import re

_ERRNO = re.compile(r"^\[Errno -?\d+\] ")


def innermost(error: BaseException) -> str:
    """Return the reason at the bottom, such as `Connection refused`, and not the wrappers above it."""
    reason = getattr(error, "reason", None)
    while isinstance(reason, BaseException):
        error, reason = reason, getattr(reason, "reason", None)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rpartition(": ")[2]
    return _ERRNO.sub("", " ".join(text.split())) or type(error).__name__

"""What a client library's error about a connection comes down to, in a few words."""

import re

_ERRNO = re.compile(r"^\[Errno -?\d+\] ")


def innermost(error: BaseException) -> str:
    """Return the reason at the bottom, such as `Connection refused`, and not the wrappers above it."""
    while isinstance(below := _below(error), BaseException):
        error = below
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rpartition(": ")[2]
    return _ERRNO.sub("", " ".join(text.split())) or type(error).__name__


def is_untrusted(error: BaseException) -> bool:
    """Return whether it is about a certificate that this machine does not trust."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def _below(error: BaseException) -> object:
    # urllib3 names it twice: the error of a proxy has the second one.
    return getattr(error, "reason", None) or getattr(error, "original_error", None)

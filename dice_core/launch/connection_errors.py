"""What a client library's error about a connection comes down to, in a few words."""

import re

# How OpenSSL says that nothing it trusts has signed.
_AUTHORITY = re.compile("self[- ]signed certificate|unable to (get|verify)")
_ERRNO = re.compile(r"^\[Errno -?\d+\] ")


def innermost(error: BaseException) -> str:
    """Return the reason at the bottom, such as `Connection refused`, and not the wrappers above it."""
    while isinstance(below := _below(error), BaseException):
        error = below
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rpartition(": ")[2]
    return _ERRNO.sub("", " ".join(text.split())) or type(error).__name__


def is_certificate_refused(error: BaseException) -> bool:
    """Return whether the other side's certificate is the reason."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def is_authority_unknown(error: BaseException) -> bool:
    """Return whether nothing that this machine trusts has signed the certificate; else its name or dates do not fit."""
    return is_certificate_refused(error) and _AUTHORITY.search(str(error)) is not None


def _below(error: BaseException) -> object:
    # urllib3 names it twice: the error of a proxy has the second one.
    return getattr(error, "reason", None) or getattr(error, "original_error", None)

"""What to say of a name that nobody knows: what may be meant, and what is allowed. Pure."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known name that is most like this one, if there is one like it."""
    return difflib.get_close_matches(name, list(known), n=1)


def allowed(name: str, known: Iterable[str], meant: Iterable[str] = ()) -> str:
    """Return the end of an error message, such as `did you mean 'beta'? allowed: beta, loss`.

    Args:
        name: that nobody knows.
        known: what is allowed in its place.
        meant: what is meant, where more is known than how the names look; else the nearest one.
    """
    names = list(known)
    words = [repr(word) for word in list(meant) or nearest(name, names)]
    hint = f"did you mean {' or '.join(words)}? " if words else ""
    return f"{hint}allowed: {', '.join(names) or 'none'}"

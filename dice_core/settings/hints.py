"""What to say of a name that nobody knows: the nearest one that there is, and all of them. Pure."""

import difflib
from collections.abc import Iterable


def allowed(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message, such as `did you mean 'beta'? allowed: beta, loss`."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names) or 'none'}"

"""Who runs a command, for the history of what it did."""

import getpass
import socket


def person() -> str:
    """Return the user and the machine; in a pod, which has no users of its own, that is the pod's name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A user id without a name, as OpenShift gives to pods.
        user = "?"
    return f"{user}@{socket.gethostname()}"

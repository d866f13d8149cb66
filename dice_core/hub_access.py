"""Whether the Hugging Face Hub answers at all. Its client asks again for half a minute before it says that it does not.

A name that is no folder here is taken for one on the Hub, so that every slip in a path comes to this question.
"""

import os
import socket
import urllib.request
from urllib.parse import urlsplit

_DEFAULT = "https://huggingface.co"


def is_hub_out_of_reach(seconds: float = 5.0) -> bool:
    """Return whether no connection to the Hub can be made.

    Of a Hub behind a proxy only the proxy knows, and with HF_HUB_OFFLINE the client itself says so at once.

    Args:
        seconds: to wait for a connection.
    """
    place = urlsplit(os.environ.get("HF_ENDPOINT") or _DEFAULT)
    has_proxy = urllib.request.getproxies().get(place.scheme) and not urllib.request.proxy_bypass(place.netloc)
    if has_proxy or os.environ.get("HF_HUB_OFFLINE"):
        return False
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), seconds).close()
    except (OSError, ValueError):
        return True
    return False

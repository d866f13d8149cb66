"""The way to Kubeflow Pipelines over HTTP: whose certificates are trusted, and through which proxy.

The same for the first call and for kfp's client, which by itself trusts certifi's list alone and knows no proxy.
"""

import os
import ssl
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import urllib3

_CA_VARIABLES = ("KFP_CA_CERT", "SSL_CERT_FILE")
TRUST_HINT = "set {} (or {}) to a file with the certificate of its authority".format(*_CA_VARIABLES)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Route:
    """What every call to a host goes by."""

    ca_file: str
    """Certificates that are trusted; empty: certifi's."""
    proxy: str
    """Empty: none."""

    def pool(self) -> "urllib3.PoolManager":
        """Return connections that go by it, as kfp's client makes them."""
        import certifi
        import urllib3

        authorities = self.ca_file or certifi.where()
        if self.proxy:
            return urllib3.ProxyManager(self.proxy, cert_reqs="CERT_REQUIRED", ca_certs=authorities)
        return urllib3.PoolManager(cert_reqs="CERT_REQUIRED", ca_certs=authorities)


def route_to(host: str) -> Route:
    """Return the route to a host, from KFP_CA_CERT or SSL_CERT_FILE, and http_proxy, https_proxy and no_proxy.

    Args:
        host: with http:// or https://.

    Raises:
        ValueError: the variable names no file of certificates.
    """
    return Route(_ca_file() if host.startswith("https://") else "", _proxy(host))


def _ca_file() -> str:
    variable = next((name for name in _CA_VARIABLES if os.environ.get(name)), "")
    if not variable:
        return ""
    path = os.environ[variable]
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ValueError(f"{variable}: must be a PEM file of certificates, got {path!r} ({error.strerror})") from None
    return path


def _proxy(host: str) -> str:
    place = urlsplit(host)
    # The end of a port-forward is this machine, which a proxy cannot reach.
    if place.hostname in _LOOPBACK or urllib.request.proxy_bypass(place.netloc):
        return ""
    proxy = urllib.request.getproxies().get(place.scheme, "")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"

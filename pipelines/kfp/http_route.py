"""The HTTP route to Kubeflow Pipelines: which certificates are trusted, and which proxy is used.

Our first call and kfp's client take the same route. By itself, kfp's client trusts only certifi's list and uses no
proxy.
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
    """The route of every call to a host."""

    ca_file: str
    """File of trusted certificates; empty: certifi's."""
    proxy: str
    """Empty: none."""

    def pool(self) -> "urllib3.PoolManager":
        """Return a connection pool for the route, made as kfp's client makes its own."""
        import certifi
        import urllib3

        authorities = self.ca_file or certifi.where()
        if self.proxy:
            return urllib3.ProxyManager(self.proxy, cert_reqs="CERT_REQUIRED", ca_certs=authorities)
        return urllib3.PoolManager(cert_reqs="CERT_REQUIRED", ca_certs=authorities)


def route_to(host: str) -> Route:
    """Return the route to a host, by KFP_CA_CERT or SSL_CERT_FILE, and http_proxy, https_proxy and no_proxy.

    Args:
        host: with http:// or https://.

    Raises:
        ValueError: the variable does not name a file of certificates.
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

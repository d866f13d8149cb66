"""MLflow's REST API, as far as requests speak it: who we are, how long we wait, what an error means.

The package mlflow-skinny asks for versions that do not fit the project's locks. What calls are made is said where they
are made: mlflow_run.py.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit, urlunsplit

from dice_core.tracking.feed import TrackerError

if TYPE_CHECKING:
    import requests

_TIMEOUT = (5.0, 15.0)
"""Seconds until a server has taken the connection, and until it has answered."""
_SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_PASSING_CODES = (408, 425, 429)


class MlflowError(TrackerError):
    """A call that failed. `code` is MLflow's name of the error, such as RESOURCE_ALREADY_EXISTS; empty: no answer."""

    def __init__(self, message: str, *, code: str = "", is_final: bool = False) -> None:
        """Take one line, and what the server called it."""
        super().__init__(message, is_final=is_final)
        self.code = code


class MlflowApi:
    """A tracking server, with the access that MLflow's own variables give."""

    def __init__(self, uri: str, environment: Mapping[str, str], timeout: tuple[float, float] = _TIMEOUT) -> None:
        """Take the server's address, variables such as MLFLOW_TRACKING_TOKEN, and seconds to connect and to answer."""
        parts = urlsplit(uri)
        self._environment, self._timeout = environment, timeout
        host = parts.netloc.rpartition("@")[2]
        self.where = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        """The address without a name and a password: what people may read."""
        self._url = f"{self.where}/api/2.0/mlflow"
        self._user_in_uri = (parts.username or "", parts.password or "") if parts.username else None
        self._session: requests.Session | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """Return the server of MLFLOW_TRACKING_URI; None where it is not set.

        Raises:
            MlflowError: it is an address that this client does not speak to.
        """
        uri = environment.get("MLFLOW_TRACKING_URI", "").strip()
        if not uri:
            return None
        scheme, _, rest = uri.partition("://")
        if scheme not in ("http", "https") or not rest:
            raise MlflowError(
                f"mlflow: MLFLOW_TRACKING_URI is no http:// or https:// address of a server ({scheme[:20]!r}): unset "
                "it, or start `mlflow server` there and name that",
                is_final=True,
            )
        return cls(uri, environment)

    def get(self, path: str, **parameters: Any) -> dict[str, Any]:
        """Call `GET path`, such as `runs/get`.

        Raises:
            MlflowError: no answer, or an error.
        """
        return self._call("GET", path, params=parameters)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Call `POST path` with a body, such as `runs/create`. See get."""
        return self._call("POST", path, json=body)

    def patch(self, path: str, **body: Any) -> dict[str, Any]:
        """Call `PATCH path` with a body, such as `registered-models/update`. See get."""
        return self._call("PATCH", path, json=body)

    def delete(self, path: str, **body: Any) -> dict[str, Any]:
        """Call `DELETE path` with a body, such as `registered-models/alias`. See get."""
        return self._call("DELETE", path, json=body)

    def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        import requests

        session = self._session = self._session or self._new_session()
        try:
            response = session.request(
                method, f"{self._url}/{path}", headers=self._headers(), timeout=self._timeout, **content
            )
        except requests.RequestException as error:
            # The text of such an error holds the address as it was given, and with it a password.
            raise MlflowError(f"no answer ({type(error).__name__})") from None
        if response.ok:
            return self._values(response)
        is_final = response.status_code < 500 and response.status_code not in _PASSING_CODES
        code, message = self._fault(response)
        raise MlflowError(f"{path}: {response.status_code} {message}".rstrip(), code=code, is_final=is_final)

    def _values(self, response: "requests.Response") -> dict[str, Any]:
        try:
            values = response.json()
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise MlflowError("answers with something other than JSON: is this an MLflow server?", is_final=True)
        return values

    @staticmethod
    def _fault(response: "requests.Response") -> tuple[str, str]:
        try:
            values = response.json()
            return str(values["error_code"]), str(values.get("message", "")).partition("\n")[0][:200]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "", response.reason or ""

    def _new_session(self) -> "requests.Session":
        import requests

        session, environment = requests.Session(), self._environment
        session.auth = self._authorise
        if environment.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
            session.verify = False
        elif certificate := environment.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
            session.verify = certificate
        session.cert = environment.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None
        return session

    def _authorise(self, request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        """Add MLflow's own credentials; requests would look for others in a .netrc otherwise."""
        from requests.auth import HTTPBasicAuth

        user = self._environment.get("MLFLOW_TRACKING_USERNAME", "")
        pair = (user, self._environment.get("MLFLOW_TRACKING_PASSWORD", "")) if user else self._user_in_uri
        if pair:
            prepared: requests.PreparedRequest = HTTPBasicAuth(*pair)(request)
            return prepared
        if token := self._token():
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    def _token(self) -> str:
        if token := self._environment.get("MLFLOW_TRACKING_TOKEN", ""):
            return token
        # Kubeflow's MLflow plugin sets it: the pod's own account. Kubernetes renews the file, so it is read each time.
        if self._environment.get("MLFLOW_TRACKING_AUTH", "").startswith("kubernetes"):
            try:
                return _SERVICE_ACCOUNT_TOKEN.read_text().strip()
            except OSError:
                return ""
        return ""

    def _headers(self) -> dict[str, str]:
        workspace = self._environment.get("MLFLOW_WORKSPACE", "")
        return {"X-MLFLOW-WORKSPACE": workspace} if workspace else {}

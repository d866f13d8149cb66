"""The Kubernetes API as preflight, logs and cancel need it: reads, access reviews, deletion; faults of one line.

Objects are plain dicts as the API's JSON has them. Running training is dice_core's business and not done here.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from pipelines.kfp.connection_errors import innermost

_SECONDS = 10
_NOT_FOUND, _FORBIDDEN, _CONFLICT = 404, 403, 409


class ClusterError(RuntimeError):
    """The Kubernetes API cannot be used as asked. The message is one line: what was asked, the cause, what to do."""


class ForbiddenError(ClusterError):
    """The person who asks may not."""


class ClusterApi:
    """A connection to the API of a cluster."""

    def __init__(self, context: str = "", namespace: str = "kubeflow") -> None:
        """Take a context of the kubeconfig (the current one if empty), or a pod's own account; makes no call.

        Raises:
            ClusterError: there is neither.
        """
        from kubernetes import client, config

        self.namespace = namespace
        try:
            # The library reads KUBECONFIG once, when it is imported.
            self._client = config.new_client_from_config(os.environ.get("KUBECONFIG"), context or None)
        except config.ConfigException as error:
            try:
                config.load_incluster_config()
            except config.ConfigException:
                raise ClusterError(
                    f"no cluster to talk to ({_line(error)}): set KUBECONFIG, or name a context of it: CONTEXT=..."
                ) from None
            self._client = client.ApiClient()
        # A cluster that is gone is told at once, and not after three attempts.
        self._client.rest_client.pool_manager.connection_pool_kw["retries"] = False
        self.host = self._client.configuration.host

    def get(self, path: str, **query: str) -> dict[str, Any] | None:
        """Return what is at a path of the API, or None where there is nothing."""
        found = self._call("GET", path, query=query)
        return None if found is None else dict(found)

    def text(self, path: str, **query: str) -> str:
        """Return a log."""
        return str(self._call("GET", path, query=query, kind="str") or "")

    def named(self, resource: str, name: str) -> dict[str, Any] | None:
        """Return an object of the namespace, such as a `configmaps`, or None where there is none."""
        return self.get(f"/api/v1/namespaces/{self.namespace}/{resource}/{name}")

    def list(self, path: str, **query: str) -> list[dict[str, Any]]:
        """Return the items of a list."""
        found = self.get(path, **query)
        return list(found["items"]) if found else []

    def delete(self, path: str, uid: str) -> bool:
        """Delete an object and what belongs to it; False: it is gone already, or another has its name."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        return self._call("DELETE", path, body=body) is not None

    def may(self, account: str, verb: str, group: str, resource: str) -> bool:
        """Return whether a service account of the namespace, or with none whoever asks, has a right in it.

        Raises:
            ForbiddenError: the person who asks may not ask that.
        """
        accounts = "system:serviceaccounts"
        resource, _, subresource = resource.partition("/")
        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": resource}
        spec: dict[str, Any] = {
            "resourceAttributes": attributes | ({"subresource": subresource} if subresource else {})
        }
        # Whoever administers the namespace alone may create the local kind; everybody the one about oneself.
        kind, path = "SelfSubjectAccessReview", "selfsubjectaccessreviews"
        if account:
            spec["user"] = f"system:serviceaccount:{self.namespace}:{account}"
            spec["groups"] = [accounts, f"{accounts}:{self.namespace}", "system:authenticated"]
            kind, path = "LocalSubjectAccessReview", f"namespaces/{self.namespace}/localsubjectaccessreviews"
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": kind,
            "metadata": {"namespace": self.namespace} if account else {},
            "spec": spec,
        }
        found = self._call("POST", f"/apis/authorization.k8s.io/v1/{path}", body=review)
        return bool(found["status"].get("allowed"))

    def _call(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None, kind: str = "object"
    ) -> Any:
        import urllib3
        from kubernetes.client import ApiException

        try:
            return self._client.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json", "Content-Type": "application/json"},
                body=body,
                response_type=kind,
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=_SECONDS,
            )
        except ApiException as error:
            if error.status == _NOT_FOUND or (method == "DELETE" and error.status == _CONFLICT):
                return None
            kind_of_error = ForbiddenError if error.status == _FORBIDDEN else ClusterError
            raise kind_of_error(f"{method} {path}: HTTP {error.status}, {_reason(error)}") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterError(
                f"{self.host}: the Kubernetes API cannot be reached ({innermost(error)}): is it up, the context right?"
            ) from None


def _reason(error: Any) -> str:
    try:
        return _line(json.loads(error.body)["message"])
    except (ValueError, TypeError, KeyError):
        return _line(error.reason)


def _line(error: object) -> str:
    return " ".join(str(error).split())

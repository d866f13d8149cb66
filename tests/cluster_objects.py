"""A stand-in for a Kubernetes API: objects by path, and access reviews answered from the suite's own Roles.

For commands that look, and at most delete; what runs training is tested against tests/kubernetes_api.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

NAMESPACE = "/api/v1/namespaces/kubeflow"
REVIEWS = "/apis/authorization.k8s.io/v1/namespaces/kubeflow/localsubjectaccessreviews"
OWN_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_ROLES = sorted((Path(__file__).parents[1] / "manifests" / "base").glob("role-[tw]*.yaml"))
Object = dict[str, Any]


@dataclass
class ClusterObjects:
    """What the API has."""

    objects: dict[str, Any] = field(default_factory=dict)
    """Path to an object, to a list of objects, or to a log."""
    forbidden: set[str] = field(default_factory=set)
    """Paths that answer 403."""
    role_rules: list[Object] = field(default_factory=lambda: [rule for path in _ROLES for rule in _rules(path)])
    """Of the service account dice-pipeline."""
    refused: set[str] = field(default_factory=set)
    """What the person who asks may not, such as `delete pytorchjobs`."""
    port: int = 0

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """Serve a call."""
        if path in self.forbidden:
            return 403, {"message": f"forbidden: User cannot {method} {path}"}
        if method == "POST" and path == REVIEWS:
            if (
                body["kind"] != "LocalSubjectAccessReview"
                or body["spec"]["resourceAttributes"]["namespace"] != "kubeflow"
            ):
                return 400, {"message": "the namespace of the review is not that of the request"}
            return 201, {**body, "status": {"allowed": self._allows(body["spec"])}}
        if method == "POST" and path == OWN_REVIEWS:
            if body["kind"] != "SelfSubjectAccessReview" or body["spec"].keys() != {"resourceAttributes"}:
                return 400, {"message": "not a review of one's own rights"}
            return 201, {**body, "status": {"allowed": _right(body["spec"]) not in self.refused}}
        if method == "DELETE":
            return self._delete(path, body)
        if path not in self.objects:
            return 404, {"message": "not found"}
        found = self.objects[path]
        if isinstance(found, list):
            return 200, {"items": [item for item in found if _selected(item, query.get("labelSelector", ""))]}
        return 200, found

    def _delete(self, path: str, body: Any) -> tuple[int, Any]:
        folder, _, name = path.rpartition("/")
        found = [item for item in self.objects.get(folder, ()) if item["metadata"]["name"] == name]
        if not found:
            return 404, {"message": "not found"}
        if found[0]["metadata"]["uid"] != body["preconditions"]["uid"]:
            return 409, {"message": "the UID in the precondition does not match"}
        self.objects[folder].remove(found[0])
        return 200, {"kind": "Status", "status": "Success"}

    def _allows(self, spec: Object) -> bool:
        wanted = spec["resourceAttributes"]
        resource = _right(spec).partition(" ")[2]
        return spec["user"] == "system:serviceaccount:kubeflow:dice-pipeline" and any(
            wanted["verb"] in rule["verbs"] and wanted["group"] in rule["apiGroups"] and resource in rule["resources"]
            for rule in self.role_rules
        )

    def kubeconfig(self, folder: Path) -> Path:
        """Write a kubeconfig that leads here."""
        path = folder / "kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "me", "user": {"token": "t"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path


def _right(spec: Object) -> str:
    wanted = spec["resourceAttributes"]
    resource = "/".join(filter(None, [wanted["resource"], wanted.get("subresource")]))
    return f"{wanted['verb']} {resource}"


def _rules(path: Path) -> list[Object]:
    return list(yaml.safe_load(path.read_text())["rules"])


def _selected(item: Object, selector: str) -> bool:
    labels = item["metadata"].get("labels", {})
    # Commas stand between terms, and between the values of one.
    for term in re.findall(r"(?:[^,(]|\([^)]*\))+", selector):
        if match := re.fullmatch(r"(\S+) in \((.*)\)", term):
            if labels.get(match[1]) not in match[2].split(","):
                return False
            continue
        name, equals, value = term.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    return True


@contextmanager
def running_cluster(objects: dict[str, Any]) -> Iterator[ClusterObjects]:
    """Serve objects on a free port of this machine."""
    cluster = ClusterObjects(objects)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return

        def _serve(self) -> None:
            place = urlsplit(self.path)
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            query = {name: values[0] for name, values in parse_qs(place.query).items()}
            status, body = cluster.answer(self.command, place.path, query, json.loads(data) if data else None)
            is_log = isinstance(body, str)
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if is_log else "application/json")
            self.end_headers()
            self.wfile.write(body.encode() if is_log else json.dumps(body).encode())

        do_GET = do_POST = do_DELETE = _serve

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    cluster.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()

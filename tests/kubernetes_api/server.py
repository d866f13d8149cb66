"""The stand-in API server: the REST calls that are used, answered over HTTP as a real one does, and its faults."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.kubernetes_api.store import KINDS, POD, Kind, Object, StatusError, Store, now

_PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>v[^/]+)"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>status|log))?)?"
)
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
Logs = Callable[[str, str, Mapping[str, str]], Iterator[bytes]]


class ApiServer:
    """Serves a Store on 127.0.0.1; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Take a folder for the kubeconfig."""
        self.store = Store()
        self.denied: set[tuple[str, str]] = set()
        """Pairs of verb and resource that the account may not use."""
        self.unserved: set[str] = set()
        """Plurals whose definition is not installed."""
        self.requests: list[str] = []
        """Method and path of each request, oldest first."""
        self.logs: Logs = _no_logs
        """Of the kubelet: namespace, pod and parameters to chunks."""
        self.kubeconfig = folder / "kubeconfig"
        self._token = "stand-in"
        self._http: _Http | None = None
        self._port = 0

    def __enter__(self) -> "ApiServer":
        self.start()
        self.kubeconfig.write_text(yaml.safe_dump(self._kubeconfig()))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._http = _Http(self, self._port)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection; what is stored stays."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def restart(self, seconds_away: float = 0.3) -> None:
        """Be away for a while, as a server whose process is replaced."""
        self.stop()
        time.sleep(seconds_away)
        self.start()

    def count(self, method: str, fragment: str) -> int:
        return sum(request.startswith(f"{method} ") and fragment in request for request in self.requests)

    def _kubeconfig(self) -> Object:
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stand-in",
            "contexts": [
                {"name": "stand-in", "context": {"cluster": "stand-in", "user": "stand-in", "namespace": "default"}}
            ],
            "clusters": [{"name": "stand-in", "cluster": {"server": self.url}}],
            "users": [{"name": "stand-in", "user": {"token": self._token}}],
        }


def _no_logs(namespace: str, pod: str, parameters: Mapping[str, str]) -> Iterator[bytes]:
    container = parameters.get("container", "")
    raise StatusError(400, f'container "{container}" in pod "{pod}" is waiting to start: ContainerCreating')


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, api: ApiServer, port: int) -> None:
        self.api, self.is_closed = api, False
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients come and go: a broken connection is no news."""

    def close(self) -> None:
        self.is_closed = True
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed by the client already


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output to itself."""

    def _answer(self) -> None:
        api, url = self.server.api, urlsplit(self.path)
        api.requests.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        parameters = {key: values[-1] for key, values in parse_qs(url.query).items()}
        try:
            if self.headers.get("Authorization") != f"Bearer {api._token}":
                raise StatusError(401, "Unauthorized", reason="Unauthorized")
            self._route(url.path, parameters, body)
        except StatusError as error:
            self._send(error.code, error.body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _route(self, path: str, parameters: Mapping[str, str], body: Object) -> None:
        api = self.server.api
        if path == "/version":
            return self._send(200, {"major": "1", "minor": "34", "gitVersion": "v1.34.0"})
        if path == _REVIEWS and self.command == "POST":
            return self._send(201, self._review(body))
        match = _PATH.fullmatch(path)
        kind = self._kind(match) if match else None
        if match is None or kind is None or kind.plural in api.unserved:
            return self._send_text(404, "404 page not found\n")
        namespace, name, sub = match["namespace"] or "", match["name"] or "", match["sub"] or ""
        self._authorize(kind, name, sub, namespace)
        if sub == "log":
            api.store.get(kind, namespace, name)
            return self._stream(api.logs(namespace, name, parameters), "text/plain")
        if self.command == "GET" and not name:
            return self._list(kind, namespace, parameters)
        self._send(*self._object_call(kind, namespace, name, sub, body))

    def _object_call(self, kind: Kind, namespace: str, name: str, sub: str, body: Object) -> tuple[int, Object]:
        store, only_status = self.server.api.store, sub == "status"
        if self.command == "POST":
            return 201, store.create(kind, namespace, body)
        if self.command == "GET":
            return 200, store.get(kind, namespace, name)
        if self.command == "PUT":
            return 200, store.replace(kind, namespace, name, body, only_status=only_status)
        if self.command == "PATCH":
            if kind.group and "strategic" in self.headers.get("Content-Type", ""):
                message = "the body of the request was in an unknown format"
                raise StatusError(415, message, reason="UnsupportedMediaType")
            return 200, store.patch(kind, namespace, name, body, only_status=only_status)
        found = store.get(kind, namespace, name)
        # A kubelet ends the processes of a pod on its node first.
        graceful = kind is POD and bool(found["spec"].get("nodeName")) and body.get("gracePeriodSeconds") != 0
        uid = (body.get("preconditions") or {}).get("uid", "")
        in_foreground = body.get("propagationPolicy") == "Foreground"
        deleted = store.delete(kind, namespace, name, uid, gracefully=graceful, in_foreground=in_foreground)
        details = {"name": name, "group": kind.group, "kind": kind.plural, "uid": deleted["metadata"]["uid"]}
        success = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return 200, deleted if kind is POD else success

    def _kind(self, match: re.Match[str]) -> Kind | None:
        wanted = (match["group"] or "", match["version"], match["plural"])
        return next((kind for kind in KINDS if (kind.group, kind.version, kind.plural) == wanted), None)

    def _authorize(self, kind: Kind, name: str, sub: str, namespace: str) -> None:
        read = "get" if name else "list"
        verb = _VERBS.get(self.command, read)
        resource = f"{kind.plural}/{sub}" if sub else kind.plural
        if (verb, resource) in self.server.api.denied:
            who = 'User "system:serviceaccount:default:dice-pipeline"'
            message = f'{resource} is forbidden: {who} cannot {verb} resource "{resource}" in API group "{kind.group}"'
            raise StatusError(403, f'{message} in the namespace "{namespace}"')

    def _review(self, body: Object) -> Object:
        asked = body["spec"].get("resourceAttributes") or {}
        resource = "/".join(part for part in (asked.get("resource"), asked.get("subresource")) if part)
        allowed = (asked.get("verb"), resource) not in self.server.api.denied
        return {**body, "metadata": {"creationTimestamp": None}, "status": {"allowed": allowed}}

    def _list(self, kind: Kind, namespace: str, parameters: Mapping[str, str]) -> None:
        store, matches = self.server.api.store, _selector(parameters)
        with store.changed:
            items, version = store.find(kind, namespace, matches), store.version
        metadata = {"resourceVersion": str(version)}
        for item in items if not kind.group else ():
            # A real server leaves these out of the items of a list.
            del item["kind"], item["apiVersion"]
        self._send(
            200, {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": metadata, "items": items}
        )

    def _stream(self, chunks: Iterator[bytes], content_type: str) -> None:
        first = next(chunks, None)
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        while first is not None and not self.server.is_closed:
            if first:
                self.wfile.write(f"{len(first):x}\r\n".encode() + first + b"\r\n")
                self.wfile.flush()
            first = next(chunks, None)
        if self.server.is_closed:
            # No last chunk: to the client this is a connection that broke.
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, code: int, body: Object) -> None:
        self._send_text(code, json.dumps(body), "application/json")

    def _send_text(self, code: int, text: str, content_type: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _selector(parameters: Mapping[str, str]) -> Callable[[Object], bool]:
    """Return the test of a request's label and field selectors: equalities only."""
    labels = [part.partition("=") for part in parameters.get("labelSelector", "").split(",") if part]
    fields = [part.partition("=") for part in parameters.get("fieldSelector", "").split(",") if part]

    def matches(item: Object) -> bool:
        of_item = item["metadata"].get("labels") or {}
        return all(of_item.get(key) == value.lstrip("=") for key, _, value in labels) and all(
            _field(item, key) == value.lstrip("=") for key, _, value in fields
        )

    return matches


def _field(item: Any, path: str) -> Any:
    for part in path.split("."):
        item = item.get(part) if isinstance(item, dict) else None
    return item


def make_event(about: Object, reason: str, message: str, kind: str = "Warning") -> Object:
    """Return an Event about an object, as the kubelet and the scheduler report it."""
    metadata = about["metadata"]
    reference = {
        "apiVersion": about["apiVersion"],
        "kind": about["kind"],
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "uid": metadata["uid"],
    }
    return {
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": reference,
        "reason": reason,
        "message": message,
        "type": kind,
        "count": 1,
        "firstTimestamp": now(),
        "lastTimestamp": now(),
        "source": {"component": "stand-in"},
    }

"""A stand-in for the API server of Kubeflow Pipelines: the v2beta1 calls that our commands make, over HTTP.

Every body is read with the models that kfp-server-api publishes: an unknown field, a wrong type or a missing required
value is a 400, as the real server answers. What it was sent stays in `requests` and in its tables.
"""

import json
import re
import socket
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import pytest
import yaml

from components import images

Row = dict[str, Any]
_NUMBER_AS_TEXT = {"max_concurrency", "interval_second"}
_NATIVE = {"int": int, "float": (int, float), "str": str, "bool": bool, "object": object, "datetime": str}
_MAX_PARAMETER_BYTES = 10_000
_STOPPABLE = ("PENDING", "RUNNING", "PAUSED")


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_shape(value: Any, kind: str, where: str) -> None:
    """Raise Refused unless a JSON value has the shape that kfp-server-api publishes for a type."""
    if value is None:
        return
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        _expect(isinstance(value, list), where, kind, value)
        for entry in value:
            check_shape(entry, match[1], where)
    elif match := re.fullmatch(r"dict\(str, (.*)\)", kind):
        _expect(isinstance(value, dict), where, kind, value)
        for name, entry in value.items():
            check_shape(entry, match[1], f"{where}.{name}")
    elif kind in _NATIVE:
        # Protobuf writes 64-bit integers as text and reads them as numbers too.
        is_number = where.rpartition(".")[2] in _NUMBER_AS_TEXT and isinstance(value, int)
        _expect(is_number or isinstance(value, _NATIVE[kind]), where, kind, value)
    else:
        _check_model(value, getattr(kfp_server_api.models, kind), where)


def _check_model(value: Any, model: Any, where: str) -> None:
    if hasattr(model, "allowable_values"):
        # kfp's client writes the operation of a filter by its number.
        is_number = isinstance(value, int) and 0 <= value < len(model.allowable_values)
        _expect(is_number or value in model.allowable_values, where, "|".join(model.allowable_values), value)
        return
    _expect(isinstance(value, dict), where, model.__name__, value)
    kinds = {json_name: model.openapi_types[name] for name, json_name in model.attribute_map.items()}
    # The JSON form of protobuf takes both spellings, and kfp's client uses the second one for filters.
    kinds |= {re.sub(r"_(.)", lambda match: match[1].upper(), name): kind for name, kind in kinds.items()}
    for name, entry in value.items():
        if name not in kinds:
            raise Refused(400, f"unknown field {where}.{name} of {model.__name__}")
        check_shape(entry, kinds[name], f"{where}.{name}")


def _expect(is_right: bool, where: str, kind: str, value: Any) -> None:
    if not is_right:
        raise Refused(400, f"{where}: {kind} expected, got {value!r}")


@dataclass
class KfpServer:
    """The server's tables, and what a test wants of it."""

    token: str = ""
    multi_user: bool = False
    pipelines: list[Row] = field(default_factory=list)
    versions: list[Row] = field(default_factory=list)
    experiments: list[Row] = field(default_factory=list)
    runs: list[Row] = field(default_factory=list)
    recurring_runs: list[Row] = field(default_factory=list)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    """(method, path, body) of every call."""
    killed: list[str] = field(default_factory=list)
    """Ids of runs whose workflow a deleted schedule took with it."""
    script: list[Row] = field(default_factory=list)
    """What becomes of a run: each time one is read, the next entry is merged into it."""
    faults: list[int | None] = field(default_factory=list)
    """Statuses to answer the next calls with, instead of serving them; 0 breaks the connection, None serves."""
    refusals: dict[str, Row] = field(default_factory=dict)
    """Ends of paths that are answered 500, with a recorded body."""
    certificate: Path | None = None
    """A PEM file with a key too: it then speaks TLS."""
    port: int = 0

    @property
    def host(self) -> str:
        """Its address."""
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    def posted(self, path: str) -> list[Any]:
        """Return the bodies sent to a path."""
        return [body for method, where, body in self.requests if method == "POST" and where == path]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any, token: str) -> Any:
        """Serve a call."""
        self.requests.append((method, path, body))
        if self.token and token != f"Bearer {self.token}":
            raise Refused(401, "Request header error: there is no user identity header.")
        if refusal := next((body for end, body in self.refusals.items() if path.endswith(end)), None):
            raise Refused(500, refusal["message"])
        for verb, pattern, handler in self._routes():
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                return handler(*match.groups(), query=query, body=body)
        raise Refused(404, f"Not Found: {method} {path}")

    def _routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        return [
            ("GET", "/healthz", lambda **_: {"multi_user": self.multi_user}),
            ("GET", "/pipelines", lambda query, **_: {"pipelines": self._list(self.pipelines, query)}),
            ("POST", "/pipelines", lambda body, **_: self._add(self.pipelines, "pipeline_id", "V2beta1Pipeline", body)),
            ("POST", "/pipelines/upload_version", self._upload_version),
            ("GET", "/pipelines/([^/]+)/versions", self._list_versions),
            ("GET", "/pipelines/([^/]+)/versions/([^/]+)", self._get_version),
            ("GET", "/experiments", lambda query, **_: {"experiments": self._list(self.experiments, query)}),
            ("POST", "/experiments", self._add_experiment),
            ("GET", "/runs", self._list_runs),
            ("POST", "/runs", self._add_run),
            ("GET", "/runs/([^/:]+)", self._get_run),
            ("POST", "/runs/([^/:]+):terminate", self._terminate),
            ("POST", "/runs/([^/:]+):retry", self._retry),
            ("GET", "/recurringruns", lambda query, **_: {"recurringRuns": self._list(self.recurring_runs, query)}),
            ("POST", "/recurringruns", self._add_recurring_run),
            ("POST", "/recurringruns/([^/:]+):disable", self._disable_recurring_run),
            ("DELETE", "/recurringruns/([^/]+)", self._delete_recurring_run),
        ]

    def _add(self, table: list[Row], key: str, model: str, body: Any, **fields: Any) -> Row:
        check_shape(body, model, "body")
        if not body.get("display_name"):
            raise Refused(400, "display_name is empty")
        row = {key: str(uuid.uuid4()), "created_at": _now(), **body, **fields}
        table.append(row)
        return row

    def _list(self, table: list[Row], query: dict[str, str]) -> list[Row]:
        rows = sorted(table, key=lambda row: row["created_at"], reverse="desc" in query.get("sort_by", ""))
        if not query.get("filter"):
            return rows
        check_shape(found := json.loads(query["filter"]), "V2beta1Filter", "filter")
        for predicate in found["predicates"]:
            wanted = predicate.get("stringValue", predicate.get("string_value"))
            rows = [row for row in rows if row.get(predicate["key"]) == wanted]
        return rows

    def _list_runs(self, *, query: dict[str, str], **_: Any) -> Row:
        rows, start, size = self._list(self.runs, query), int(query.get("page_token") or 0), int(query["page_size"])
        token = str(start + size) if start + size < len(rows) else ""
        return {"runs": rows[start : start + size], "next_page_token": token}

    def _upload_version(self, *, query: dict[str, str], body: Message) -> Row:
        (part,) = [part for part in body.get_payload() if isinstance(part, Message)]
        documents = list(yaml.load_all(part.get_payload(decode=True), yaml.CSafeLoader))
        if any(row["display_name"] == query["name"] for row in self.versions):
            raise Refused(409, f"Already exist error: pipeline version {query['name']} already exists")
        row = {
            "pipeline_id": query["pipelineid"],
            "pipeline_version_id": str(uuid.uuid4()),
            "display_name": query["name"],
            "description": query.get("description", ""),
            "created_at": _now(),
            "pipeline_spec": {"pipeline_spec": documents[0], "platform_spec": documents[1]},
        }
        self.versions.append(row)
        return row

    def _list_versions(self, pipeline_id: str, *, query: dict[str, str], **_: Any) -> Row:
        rows = [row for row in self._list(self.versions, query) if row["pipeline_id"] == pipeline_id]
        return {"pipeline_versions": rows}

    def _get_version(self, pipeline_id: str, version_id: str, **_: Any) -> Row:
        return _only(self.versions, pipeline_id=pipeline_id, pipeline_version_id=version_id)

    def _add_experiment(self, *, body: Any, **_: Any) -> Row:
        if self.multi_user and not body.get("namespace"):
            raise Refused(400, "namespace is empty in multi-user mode")
        if body.get("namespace") and not self.multi_user:
            raise Refused(400, "In single-user mode, CreateExperimentRequest shouldn't contain namespace")
        return self._add(self.experiments, "experiment_id", "V2beta1Experiment", body)

    def _add_run(self, *, body: Any, **_: Any) -> Row:
        row = self._add(self.runs, "run_id", "V2beta1Run", body, state="PENDING")
        self._check_start(body)
        return row

    def _check_start(self, body: Row) -> None:
        """Refuse what refers to nothing, and parameters that the pipeline does not have or cannot take."""
        _only(self.experiments, experiment_id=body["experiment_id"])
        reference = body["pipeline_version_reference"]
        version = _only(self.versions, **reference)
        inputs = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        given = body["runtime_config"]["parameters"]
        if len(json.dumps(given)) > _MAX_PARAMETER_BYTES:
            raise Refused(400, "The input parameter length exceed maximum size of 10000.")
        if unknown := given.keys() - inputs.keys():
            raise Refused(400, f"parameter {', '.join(sorted(unknown))} not found in the pipeline")
        if missing := [name for name, entry in inputs.items() if not entry.get("isOptional") and name not in given]:
            raise Refused(400, f"parameter {', '.join(missing)} is missing")

    def _get_run(self, run_id: str, **_: Any) -> Row:
        row = _only(self.runs, run_id=run_id)
        if self.script:
            row.update(self.script.pop(0))
        return row

    def _terminate(self, run_id: str, **_: Any) -> Row:
        # The real server changes the row of a run that can still be stopped, and calls every other one not found.
        row = next((row for row in self.runs if row["run_id"] == run_id and row["state"] in _STOPPABLE), None)
        if row is None:
            raise Refused(
                400,
                f"Failed to terminate a run: Invalid input error: Failed to terminate run {run_id}. Row not found",
            )
        row["state"] = "CANCELING"
        return {}

    def _retry(self, run_id: str, **_: Any) -> Row:
        row = _only(self.runs, run_id=run_id)
        if row["state"] not in ("FAILED", "CANCELED"):
            raise Refused(400, "workflow cannot be retried: Workflow must be Failed/Error to retry")
        row["state"] = "RUNNING"
        return {}

    def _add_recurring_run(self, *, body: Any, **_: Any) -> Row:
        if not 1 <= int(body["max_concurrency"]) <= 10:
            raise Refused(400, "max_concurrency out of range")
        row = self._add(self.recurring_runs, "recurring_run_id", "V2beta1RecurringRun", body, status="ENABLED")
        self._check_start(body)
        return row

    def _disable_recurring_run(self, identity: str, **_: Any) -> Row:
        _only(self.recurring_runs, recurring_run_id=identity).update(mode="DISABLE", status="DISABLED")
        return {}

    def _delete_recurring_run(self, identity: str, **_: Any) -> Row:
        # The workflow goes with its owner; the row of the run stays as it is, RUNNING for ever.
        self.killed += [
            row["run_id"]
            for row in self.runs
            if row.get("recurring_run_id") == identity and row["state"] not in ("SUCCEEDED", "FAILED")
        ]
        self.recurring_runs.remove(_only(self.recurring_runs, recurring_run_id=identity))
        return {}


def _only(table: list[Row], **keys: str) -> Row:
    found = [row for row in table if all(row.get(name) == value for name, value in keys.items())]
    if len(found) != 1:
        raise Refused(404, f"ResourceNotFoundError: {keys}")
    return found[0]


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _handler(server: KfpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return

        def _serve(self) -> None:
            place = urlsplit(self.path)
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if server.faults and (fault := server.faults.pop(0)) is not None:
                self._fail(fault)
                return
            query = {name: values[0] for name, values in parse_qs(place.query).items()}
            path = place.path.removeprefix("/apis/v2beta1")
            try:
                found = server.answer(self.command, path, query, self._body(data), self.headers["Authorization"] or "")
                self._reply(200, found)
            except Refused as error:
                self._reply(error.status, {"code": 3, "message": str(error)})

        def _fail(self, status: int) -> None:
            if status:
                self._reply(status, {"message": "asked for by the test"})
            else:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def _body(self, data: bytes) -> Any:
            if self.headers.get_content_type() == "multipart/form-data":
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                return BytesParser().parsebytes(head + data)
            return json.loads(data) if data else None

        def _reply(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _serve

    return Handler


def name_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile for images of a registry, as whoever submits to a pool of GPUs has to."""
    for name in ("CORE", "GENERATE", "TRAIN"):
        monkeypatch.setattr(images, name, f"registry.example.com/dice/{name.lower()}:1")


@contextmanager
def running_kfp_server(**wishes: Any) -> Iterator[KfpServer]:
    """Run the server on a free port of this machine."""
    server = KfpServer(**wishes)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    server.port = http.server_address[1]
    if server.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.certificate)
        http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()

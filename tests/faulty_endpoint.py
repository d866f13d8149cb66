"""A server that speaks OpenAI's API with the faults of real ones: in front of a real server, or with recorded answers.

A fault is one answer: the next request meets the next one. `answer` gives the others.
"""

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, str]]
"""From the body of a request to a status and a body."""

_FAULTS: dict[str, tuple[int, dict[str, str], str]] = {
    # As rate limits of gateways say it; so short that a test need not wait.
    "429": (429, {"Retry-After": "0.01"}, '{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}'),
    "500": (500, {"Retry-After": "0.01"}, '{"error": {"message": "internal"}}'),
    "503": (503, {"Retry-After": "0.01"}, "upstream connect error"),
    "html": (200, {"Content-Type": "text/html"}, "<html><body>A</body></html>"),
    "garbage": (200, {}, '{"choices": [{"mess'),
    "array": (200, {}, "[]"),
    "no choices": (200, {}, '{"choices": []}'),
    "content of another form": (200, {}, '{"choices": [{"message": {"content": {"text": "A"}}}]}'),
    "401": (401, {}, '{"error": {"message": "Incorrect API key provided: KEY"}}'),
    "404": (404, {}, '{"error": {"message": "The model does not exist"}}'),
    "400": (400, {}, '{"error": {"message": "the request KEY was flagged by a filter"}}'),
}


@dataclass
class FaultyEndpoint:
    """A server under way."""

    url: str
    faults: list[str] = field(default_factory=list)
    """Of the next requests, in their order: a name of _FAULTS, `hang` or `drop`."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of all requests."""
    most_at_a_time: int = 0


@contextmanager
def faulty_endpoint(answer: Answer, *, key: str, hang_seconds: float = 30) -> Iterator[FaultyEndpoint]:
    """Run a server that wants a key, and answers `answer` where no fault is set."""
    lock, under_way = threading.Lock(), [0]
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.bodies.append(body)
                under_way[0] += 1
                state.most_at_a_time = max(state.most_at_a_time, under_way[0])
                fault = state.faults.pop(0) if state.faults else ""
            try:
                self._reply(fault, body)
            finally:
                with lock:
                    under_way[0] -= 1

        def _reply(self, fault: str, body: dict[str, Any]) -> None:
            if self.headers["Authorization"] != f"Bearer {key}":
                fault = "401"
            if fault == "hang":
                released.wait(hang_seconds)
            if fault in ("hang", "drop"):
                self.close_connection = True
                return
            status, headers, text = (*_FAULTS[fault],) if fault else (*_split(answer(body)),)
            data = text.replace("KEY", key).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = FaultyEndpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _split(answer: tuple[int, str]) -> tuple[int, dict[str, str], str]:
    return answer[0], {}, answer[1]


def forwarded(url: str, key: str) -> Answer:
    """Return the answers of a real server."""

    def answer(body: dict[str, Any]) -> tuple[int, str]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return answer


def completion(text: str | None, first_tokens: dict[str, float] | None = None, usage: bool = True) -> str:
    """Return a reply in the form that OpenAI's API has (recorded from vLLM 0.32, what nobody reads left out)."""
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in (first_tokens or {}).items()]
    logprobs = {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": top}]} if top else None
    reply: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "judge",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}],
    }
    if usage:
        reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    return json.dumps(reply)


def told(replies: Sequence[str]) -> Answer:
    """Return replies in their order, the last one for ever."""
    left = list(replies)
    return lambda _: (200, left.pop(0) if len(left) > 1 else left[0])

"""A real S3 server that is killed and comes back, and a line to it that loses what it carries."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipelines.demo.object_store import Credentials, ObjectStore, start_object_store


def _answer(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return f"{head}\r\n\r\n{body}".encode()


class KillableStore:
    """SeaweedFS at one address, with one set of credentials, as often as it is started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = start_object_store(folder)
        self._port = int(self.endpoint.rpartition(":")[2])

    @property
    def endpoint(self) -> str:
        return self._store.endpoint

    @property
    def credentials(self) -> Credentials:
        return self._store.credentials

    def environment(self) -> dict[str, str]:
        return self._store.environment()

    def kill(self) -> None:
        """End it as the kernel does for want of memory."""
        self._store.process.kill()
        self._store.process.wait()

    def start(self) -> ObjectStore:
        self._store.stop()
        self._store = start_object_store(self._folder, port=self._port, credentials=self.credentials)
        return self._store

    def start_in(self, seconds: float) -> threading.Thread:
        """Start it later, in a process that outlives the thread that starts it."""
        timer = threading.Timer(seconds, self._start_elsewhere)
        timer.start()
        return timer

    def _start_elsewhere(self) -> None:
        self._store.stop()
        self._store = start_object_store(
            self._folder, port=self._port, credentials=self.credentials, outlive_parent=True
        )

    def stop(self) -> None:
        self._store.stop()


class Line:
    """Carries requests to a server, and loses what it is told to."""

    def __init__(self, endpoint: str) -> None:
        self._port = int(endpoint.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_requests = 0
        self.num_refused = self.num_lost = self.num_cut = 0
        """Of the next requests, how many are refused (503), have their answer lost, or cut."""
        self.lost_method = b""
        """The answers to requests of this method alone are lost; empty: to any."""
        self.denied = b""
        """Requests that begin so are denied; empty: none."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        request = [b""]
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            threading.Thread(target=self._pump, args=(client, server, request), daemon=True).start()
            self._answer(server, client, request)

    def _answer(self, server: socket.socket, client: socket.socket, request: list[bytes]) -> None:
        try:
            while data := server.recv(65536):
                if not data.startswith(b"HTTP/1.1 100 "):
                    if self.num_lost and request[0].startswith(self.lost_method):
                        self.num_lost -= 1
                        return
                    if self.num_cut:
                        self.num_cut -= 1
                        client.sendall(data[: len(data) - 10])
                        return
                client.sendall(data)
        except OSError:
            return
        finally:
            # Closing alone says nothing to the other side while a thread still reads here.
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _pump(self, source: socket.socket, target: socket.socket, request: list[bytes]) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if data.startswith((b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")):
                    self.num_requests += 1
                    request[0] = data
                    if self.num_refused:
                        self.num_refused -= 1
                        source.sendall(_answer("503 Slow Down", "SlowDown"))
                        break
                    if self.denied and data.startswith(self.denied):
                        source.sendall(_answer("403 Forbidden", "AccessDenied"))
                        break
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def line_to(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """Lead this process to a server over a line of its own."""
    line = Line(store.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
    try:
        yield line
    finally:
        line.close()

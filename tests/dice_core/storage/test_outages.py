"""A store that is killed, refuses or loses answers costs time and nothing else; what cannot pass is said at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dice_core.storage.address import open_storage
from dice_core.storage.contract import ConflictError, StorageError
from dice_core.storage.manifest import Manifest, fetch_files, publish_files, require_manifest
from dice_core.storage.outages import StorePatience
from dice_core.storage.s3 import S3Storage
from pipelines.demo.object_store import ObjectStore
from tests.faulty_store import KillableStore, Line, line_to

ROOT = Path(__file__).parents[3]
QUICK = StorePatience(give_up=10, first_pause=0.05, longest_pause=0.2)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KillableStore]:
    """Return a server of this test's own, which os.environ leads to."""
    killable = KillableStore(tmp_path / "store")
    for name, value in killable.environment().items():
        monkeypatch.setenv(name, value)
    yield killable
    killable.stop()


@pytest.fixture
def line(s3: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    with line_to(object_store, monkeypatch) as carried:
        yield carried


def over(s3: str, patience: StorePatience = QUICK) -> S3Storage:
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    return S3Storage(bucket, prefix, part_bytes=5 * 2**20, patience=patience)


class Worker(threading.Thread):
    """Does a work again and again until told to stop, and keeps its error."""

    def __init__(self, work: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self._work, self._stop_wanted = work, threading.Event()
        self.num_done, self.error = 0, None
        self.start()

    def run(self) -> None:
        try:
            while not self._stop_wanted.is_set():
                self._work(self.num_done)
                self.num_done += 1
        except Exception as error:
            self.error = error

    def finish(self) -> int:
        self._stop_wanted.set()
        self.join(60)
        if self.error is not None:
            raise self.error
        assert not self.is_alive()
        return self.num_done


@pytest.mark.slow
def test_a_store_that_is_killed_again_and_again_costs_time_alone(
    store: KillableStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    storage, source = over("s3://dice/work"), tmp_path / "source"
    source.write_bytes(os.urandom(11 * 2**20))  # three parts
    storage.upload(source, "fixed")

    def count(_: int) -> None:
        """Add one to a number that others write too."""
        found = storage.read_versioned("number")
        number = int(found[0]) if found else 0
        storage.write_if_version("number", b"%d" % (number + 1), found[1] if found else None)

    def publish(number: int) -> None:
        uri = f"s3://dice/stage-{number}"
        publish_files(uri, {"a": source, "b": source}, Manifest(stage="x", fingerprint="", files={}))
        fetch_files(uri, require_manifest(uri), tmp_path / "fetched")

    def up_and_down(number: int) -> None:
        storage.upload(source, f"file-{number}")
        storage.download(f"file-{number}", tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == source.read_bytes()

    def read_and_list(_: int) -> None:
        assert storage.read_bytes("fixed") == source.read_bytes()
        assert "fixed" in [found.key for found in storage.list()]

    workers = {work: Worker(work) for work in (count, publish, up_and_down, read_and_list)}
    for _ in range(3):
        time.sleep(0.5)
        store.kill()
        time.sleep(0.2)
        store.start()
    num_done = {work: worker.finish() for work, worker in workers.items()}
    assert all(num_done.values())
    assert storage.read_bytes("number") == b"%d" % num_done[count]


@pytest.mark.slow
def test_a_wait_is_told_once_and_so_is_its_end(store: KillableStore, capsys: pytest.CaptureFixture[str]) -> None:
    storage = over("s3://dice/told")
    storage.write_bytes("x", b"1")
    store.kill()
    workers = [Worker(lambda _: storage.write_bytes("x", b"1")) for _ in range(4)]
    time.sleep(1)
    store.start()
    assert all(worker.finish() for worker in workers)
    lines = [text.partition(" ")[2] for text in capsys.readouterr().err.splitlines()]
    assert lines[0] == f"storage: {store.endpoint} cannot be reached: trying again for up to 10 s"
    assert lines[1].startswith(f"storage: {store.endpoint} answers again after ")
    assert len(lines) == 2


@pytest.mark.slow
def test_patience_ends_and_what_is_asked_after_that_fails_at_once(store: KillableStore, tmp_path: Path) -> None:
    storage = over("s3://dice/x", StorePatience(give_up=2, first_pause=0.05, longest_pause=0.2))
    storage.write_bytes("x", b"1")
    store.kill()
    began = time.monotonic()
    with pytest.raises(StorageError, match=rf"^s3://dice/x/x: cannot reach {store.endpoint} for 2 s: check AWS_ENDPO"):
        storage.read_bytes("x")
    assert 1.5 < time.monotonic() - began < 4
    began = time.monotonic()
    with pytest.raises(StorageError, match="cannot reach"):
        storage.list()
    assert time.monotonic() - began < 1.5
    store.start()
    assert storage.read_bytes("x") == b"1"


@pytest.mark.slow
def test_a_pod_waits_for_a_store_that_has_never_answered_and_a_person_does_not(
    store: KillableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.kill()
    began = time.monotonic()
    with pytest.raises(StorageError, match="cannot reach"):
        open_storage("s3://dice").list()
    assert time.monotonic() - began < 8
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    store.start_in(1)
    assert over("s3://dice").list() == []


def test_a_busy_store_is_asked_again(s3: str, line: Line, tmp_path: Path) -> None:
    storage = over(s3)
    storage.write_bytes("busy", b"1")
    line.num_refused = 5
    assert storage.read_bytes("busy") == b"1"
    (tmp_path / "file").write_bytes(b"2")
    line.num_refused = 5
    storage.upload(tmp_path / "file", "busy")
    assert storage.read_bytes("busy") == b"2"
    assert line.num_refused == 0


def test_what_is_refused_is_asked_once(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        over("s3://nobody-has-it").list()
    assert line.num_requests == 1
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY"):
        over("s3://dice").write_bytes("x", b"1")
    assert line.num_requests == 2


def test_a_stream_that_breaks_in_the_middle_is_read_again(s3: str, line: Line, tmp_path: Path) -> None:
    storage, data = over(s3), b"0123456789" * 10
    storage.write_bytes("stream", data)
    line.num_cut = 3
    assert storage.read_bytes("stream") == data
    assert line.num_cut == 0
    line.num_cut = 3
    storage.download("stream", tmp_path / "stream")
    assert (tmp_path / "stream").read_bytes() == data


@pytest.mark.parametrize("exists", [False, True])
def test_a_conditional_write_whose_answer_is_lost_has_won(s3: str, line: Line, exists: bool) -> None:
    storage, key = over(s3), f"lost-{exists}"
    if exists:
        storage.write_bytes(key, b"0")
    read = storage.read_versioned(key)
    version = read[1] if read else None
    storage.list()
    line.num_lost = 1
    storage.write_if_version(key, b"mine", version)
    assert line.num_lost == 0
    assert storage.read_bytes(key) == b"mine"
    with pytest.raises(ConflictError):
        storage.write_if_version(key, b"mine", version)


def test_a_conditional_write_that_lost_conflicts_also_after_a_lost_answer(s3: str, line: Line) -> None:
    storage = over(s3)
    storage.write_bytes("others", b"theirs")
    line.num_lost = 1
    with pytest.raises(ConflictError):
        storage.write_if_version("others", b"mine", None)
    assert storage.read_bytes("others") == b"theirs"


def test_an_upload_whose_completion_lost_its_answer_is_whole(s3: str, line: Line, tmp_path: Path) -> None:
    storage, source = over(s3), tmp_path / "source"
    source.write_bytes(os.urandom(11 * 2**20))

    # A POST begins an upload, and another one completes it.
    storage.upload(source, "before")
    line.lost_method, line.num_lost = b"POST", 2
    storage.upload(source, "whole")
    assert line.num_lost == 0
    assert storage.read_bytes("whole") == source.read_bytes()


_WAIT = """
import sys
from pathlib import Path
from dice_core.storage.manifest import Manifest, publish_files
files = {name: Path(sys.argv[1]) for name in sys.argv[2]}
publish_files("s3://dice/x", files, Manifest(stage="x", fingerprint="", files={}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", ["a", "abcdef"])
def test_ctrl_c_ends_a_wait(store: KillableStore, tmp_path: Path, names: str) -> None:
    store.kill()
    environment = {**os.environ, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    (tmp_path / "file").write_bytes(b"1")
    process = subprocess.Popen(
        [sys.executable, "-c", _WAIT, str(tmp_path / "file"), names], cwd=ROOT, env=environment, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    with process.stderr as lines:
        assert any(b"cannot be reached" in text for text in iter(lines.readline, b""))
        process.send_signal(signal.SIGINT)
        process.wait(10)
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_a_stage_that_begins_and_works_while_the_store_is_away_succeeds(
    store: KillableStore, tiny_model: Path, tmp_path: Path
) -> None:
    from dice_core.models.importing import import_model

    import_model(str(tiny_model), "s3://dice/model")
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    source = tmp_path / "preferences.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    open_storage("s3://dice").upload(source, "preferences.jsonl")
    store.kill()
    stage = ["prepare-data", "--preferences", "s3://dice/preferences.jsonl", "--output", "s3://dice/data"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dice_core.cli", *stage, "--policy", "s3://dice/model", "--set", "data.num_held_out=8"],
        cwd=ROOT,
        env={**os.environ, "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for text in process.stderr:
        said.append(text)
        if "cannot be reached" in text and len(said) == 1:
            store.start()
        if "answers again" in text and not any("completed" in line for line in said):
            store.kill()
            store.start()
    assert process.wait(60) == 0, "".join(said)
    assert require_manifest("s3://dice/data").stage == "prepare-data"

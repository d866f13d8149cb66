"""Every promise of storage.Storage, on a real S3 server and on a folder, by the very same tests."""

import threading
import time
import uuid
from pathlib import Path

import boto3
import pytest

from dice_core.storage.address import open_storage
from dice_core.storage.contract import ConflictError, MissingObjectError, Storage, StorageError, StoredObject
from dice_core.storage.folder import FolderStorage
from dice_core.storage.s3 import S3Storage
from pipelines.demo.object_store import ObjectStore


@pytest.fixture(params=["s3", "folder"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Return an empty storage of each kind."""
    if request.param == "folder":
        return open_storage(str(tmp_path / "storage"))
    return open_storage(f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}")


def _one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_is_written_is_read_and_listed_in_order(storage: Storage) -> None:
    storage.write_bytes("b/two.json", b"22")
    storage.write_bytes("a.json", b"1")
    storage.write_bytes("b/\u00e9 +%.json", b"")

    assert storage.read_bytes("b/two.json") == b"22"
    assert storage.list() == [
        StoredObject("a.json", 1),
        StoredObject("b/two.json", 2),
        StoredObject("b/\u00e9 +%.json", 0),
    ]
    assert storage.list("b/t") == [StoredObject("b/two.json", 2)]
    assert storage.list("nothing/") == []


def test_neighbours_with_the_same_beginning_are_not_listed(storage: Storage) -> None:
    open_storage(storage.uri + "/run-1").write_bytes("x", b"1")
    open_storage(storage.uri + "/run-10").write_bytes("x", b"1")

    assert [found.key for found in open_storage(storage.uri + "/run-1").list()] == ["x"]


def test_a_missing_object_is_named(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError) as read:
        storage.read_bytes("no/such.json")
    with pytest.raises(MissingObjectError) as downloaded:
        storage.download("no/such.json", tmp_path / "down" / "such.json")

    assert f"{storage.uri}/no/such.json" in _one_line(read)
    assert f"{storage.uri}/no/such.json" in _one_line(downloaded)
    assert list((tmp_path / "down").iterdir()) == []
    assert storage.read_versioned("no/such.json") is None


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../neighbour", "a/../../b", "a//b", "a/"])
def test_a_key_cannot_leave_the_storage(storage: Storage, key: str) -> None:
    with pytest.raises(StorageError, match="not a key"):
        storage.write_bytes(key, b"")


def test_a_file_comes_back_the_same(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "down" / "target"
    source.write_bytes(bytes(range(256)) * 100)

    storage.upload(source, "deep/er/file.bin")
    storage.download("deep/er/file.bin", target)

    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_an_empty_file_comes_back_empty(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "source").touch()
    storage.upload(tmp_path / "source", "empty")
    storage.download("empty", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b""


def test_a_small_download_is_one_request(s3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = open_storage(s3)
    storage.write_bytes("small", b"x")

    with caplog.at_level("DEBUG", "urllib3.connectionpool"):
        storage.download("small", tmp_path / "small")

    # Each answer is logged: 'http://127.0.0.1:18600 "GET /dice/0123abcd/small HTTP/1.1" 200 1'.
    answers = [record.getMessage() for record in caplog.records if "HTTP/1.1" in record.getMessage()]
    assert len(answers) == 1 and '"GET ' in answers[0]


def test_a_large_file_travels_in_parts_and_comes_back_the_same(s3: str, tmp_path: Path) -> None:
    bucket, prefix = s3.removeprefix("s3://").split("/")
    storage = S3Storage(bucket, prefix, part_bytes=5 * 1024 * 1024, num_threads=3)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(251)) * 50_000)  # 12.5 MB: three parts, the last one smaller

    storage.upload(source, "large.bin")
    storage.download("large.bin", target)

    version = storage.read_versioned("large.bin")
    assert version is not None and version[1].endswith('-3"'), "S3 marks an object of three parts so"
    assert target.read_bytes() == source.read_bytes()


def test_a_download_replaces_an_older_file(storage: Storage, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"older and longer")
    storage.write_bytes("x", b"new")

    storage.download("x", target)

    assert target.read_bytes() == b"new"


def test_a_missing_file_is_not_uploaded(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        storage.upload(tmp_path / "nothing", "x")

    assert storage.list() == []


def test_a_write_of_an_outdated_version_conflicts(storage: Storage) -> None:
    storage.write_if_version("pointer", b"1", None)
    read = storage.read_versioned("pointer")
    assert read is not None and read[0] == b"1"
    storage.write_if_version("pointer", b"2", read[1])

    with pytest.raises(ConflictError) as outdated:
        storage.write_if_version("pointer", b"3", read[1])
    with pytest.raises(ConflictError):
        storage.write_if_version("pointer", b"3", None)
    with pytest.raises(ConflictError):
        storage.write_if_version("never-written", b"3", read[1])

    assert "pointer" in _one_line(outdated)
    assert storage.read_bytes("pointer") == b"2"
    assert [found.key for found in storage.list()] == ["pointer"]


@pytest.mark.parametrize("exists", [False, True])
def test_of_many_writers_at_once_exactly_one_wins(storage: Storage, exists: bool) -> None:
    if exists:
        storage.write_bytes("pointer", b"start")
    read = storage.read_versioned("pointer")
    version = read[1] if read else None
    winners: list[bytes] = []
    start = threading.Barrier(8)

    def write(name: bytes) -> None:
        start.wait()
        try:
            storage.write_if_version("pointer", name, version)
        except ConflictError:
            return
        winners.append(name)

    threads = [threading.Thread(target=write, args=(b"writer %d" % index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert winners == [storage.read_bytes("pointer")]


def test_threads_can_move_files_at_once(storage: Storage, tmp_path: Path) -> None:
    def move(index: int) -> None:
        path = tmp_path / f"source-{index}"
        path.write_bytes(b"%d" % index * 1000)
        storage.upload(path, f"part-{index}")
        storage.download(f"part-{index}", tmp_path / f"target-{index}")

    threads = [threading.Thread(target=move, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for index in range(6):
        assert (tmp_path / f"target-{index}").read_bytes() == b"%d" % index * 1000


def test_delete_takes_what_is_below_the_prefix_only(storage: Storage) -> None:
    for key in ("a/1/x", "a/1/manifest.json", "a/10/x", "b"):
        storage.write_bytes(key, b"1")

    assert storage.delete("a/1/") == 2
    assert [found.key for found in storage.list()] == ["a/10/x", "b"]
    assert storage.delete("") == 2
    assert storage.delete("") == 0


def test_a_listing_goes_on_after_the_first_page(s3: str) -> None:
    bucket, prefix = s3.removeprefix("s3://").split("/")
    storage = S3Storage(bucket, f"{prefix}/pages", keys_per_request=3)
    for index in range(7):
        storage.write_bytes(f"part-{index}", b"")

    assert len(storage.list()) == 7
    assert storage.delete("part-") == 7
    assert storage.list() == []


def test_an_empty_object_that_stands_for_a_folder_is_no_file(s3: str, object_store: ObjectStore) -> None:
    import boto3

    prefix = s3.rpartition("/")[2]
    client = boto3.client("s3", endpoint_url=object_store.endpoint)
    client.put_object(Bucket=object_store.bucket, Key=f"{prefix}/console/folder/", Body=b"")

    assert open_storage(f"{s3}/console").list() == []


def test_a_bucket_that_does_not_exist_is_named(s3: str, object_store: ObjectStore, tmp_path: Path) -> None:
    storage, path = open_storage("s3://nobody-has-it/runs/1"), tmp_path / "file"
    path.write_bytes(b"1")
    for call in (
        lambda: storage.list(),
        lambda: storage.read_bytes("x"),
        lambda: storage.write_bytes("x", b""),
        lambda: storage.upload(path, "x"),
        lambda: storage.download("x", path),
        lambda: storage.write_if_version("x", b"", None),
    ):
        with pytest.raises(StorageError) as error:
            call()
        assert not isinstance(error.value, MissingObjectError)
        message = _one_line(error)
        assert "s3://nobody-has-it/runs/1" in message
        assert f"bucket 'nobody-has-it' does not exist at {object_store.endpoint}" in message


@pytest.mark.parametrize(
    ("variable", "cause"), [("AWS_ACCESS_KEY_ID", "does not know"), ("AWS_SECRET_ACCESS_KEY", "does not fit")]
)
def test_wrong_credentials_are_named(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, cause: str
) -> None:
    open_storage(s3).write_bytes("x", b"1")
    monkeypatch.setenv(variable, "wrong")

    with pytest.raises(StorageError) as read:
        open_storage(s3).read_bytes("x")
    with pytest.raises(StorageError) as downloaded:
        open_storage(s3).download("x", tmp_path / "x")

    for error in (read, downloaded):
        message = _one_line(error)
        assert f"{s3}/x" in message and cause in message and variable in message


def test_no_credentials_are_named(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

    with pytest.raises(StorageError) as error:
        open_storage(s3).list()

    assert "no credentials: set AWS_ACCESS_KEY_ID" in _one_line(error)


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_fails_in_seconds(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()

    with pytest.raises(StorageError) as error:
        open_storage(s3).read_bytes("x")

    assert time.monotonic() - start < 15
    assert "cannot reach http://127.0.0.1:9" in _one_line(error)


def test_an_endpoint_without_a_scheme_is_explained(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:8333")

    with pytest.raises(StorageError, match="write it as http://host:port"):
        open_storage(s3).list()


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "s3://UPPER/x", "", "https://example.org/x"])
def test_other_kinds_of_uri_are_refused(uri: str) -> None:
    with pytest.raises(StorageError, match=r"allowed|write s3://bucket/prefix|no bucket can be called"):
        open_storage(uri)


def test_folders_are_named_in_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    for uri in ("runs/one", f"{tmp_path}/runs/one/", f"file://{tmp_path}/runs/one"):
        assert open_storage(uri).uri == f"{tmp_path}/runs/one"
    assert list(tmp_path.iterdir()) == [], "opening makes nothing"


def test_a_folder_where_a_file_is_in_the_way_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StorageError) as error:
        FolderStorage(tmp_path / "file").write_bytes("x", b"1")

    assert str(tmp_path / "file") in _one_line(error)


def test_an_interrupted_upload_to_a_folder_is_not_seen(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "storage")

    # It is there, and whoever reads it gets an error.
    with pytest.raises(StorageError, match=r"storage/x: "):
        storage.upload(Path("/proc/self/mem"), "x")

    assert storage.list() == []
    assert list((tmp_path / "storage").iterdir()) == []


def test_uploads_that_were_never_finished_are_deleted_below_the_prefix_only(s3: str, object_store: ObjectStore) -> None:
    client = boto3.client("s3")
    prefix = s3.removeprefix(f"s3://{object_store.bucket}/") + "/killed"
    uploads = {}
    for key in ("stage/model.bin", "stage/deep/er.bin", "stage-2/model.bin"):
        place = {"Bucket": object_store.bucket, "Key": f"{prefix}/{key}"}
        uploads[key] = client.create_multipart_upload(**place)["UploadId"]
        client.upload_part(**place, UploadId=uploads[key], PartNumber=1, Body=b"x")
    stage = open_storage(f"s3://{object_store.bucket}/{prefix}/stage")
    stage.write_bytes("finished", b"x")
    assert stage.delete_unfinished(3600) == 0
    assert stage.delete_unfinished(0) == 2
    assert [found.key for found in stage.list()] == ["finished"]
    left = client.list_multipart_uploads(Bucket=object_store.bucket, Prefix=prefix)["Uploads"]
    assert [upload["UploadId"] for upload in left] == [uploads["stage-2/model.bin"]]


def test_half_written_files_are_deleted_once_they_are_old(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    half = tmp_path / "deep" / ".model.bin.0123.unfinished"
    half.write_bytes(b"x")
    storage = FolderStorage(tmp_path)
    storage.write_bytes("finished", b"x")
    assert storage.delete_unfinished(3600) == 0
    assert storage.delete_unfinished(0) == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["finished"]
    assert FolderStorage(tmp_path / "nowhere").delete_unfinished(0) == 0


@pytest.mark.parametrize(
    "uri", ["s3:/dice/x", "s3:dice/x", "s3//dice/x", "S3:/dice/x", "file:/tmp/x", "https:/host/x", "gs:/b/x", "foo:/x"]
)
def test_a_slip_in_an_address_is_no_folder(uri):
    with pytest.raises(StorageError, match="write s3://bucket/prefix"):
        open_storage(uri)


@pytest.mark.parametrize("path", ["runs/2026-01-05T03:00:00/x", "./s3:/x", "a:b/c", "s3/x", "/tmp/x:/y"])
def test_a_folder_may_have_a_colon_in_its_name(path):
    assert isinstance(open_storage(path), FolderStorage)

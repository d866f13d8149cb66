"""Storage: a model of four files to an S3 server and back, ours and plain boto3 file after file, SHA-256 on both sides.

The server is SeaweedFS on this machine: what differs is what the client does with the same disk and processors.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.benchmarks.measure import Comparison, Stopwatch, Timed, Values, stopwatch
from tests.benchmarks.work import Work

_NUM_FILES = 4
_FILE_BYTES = {"smoke": 2**20, "full": 135 * 10**6}


def _model(work: Work) -> dict[str, Path]:
    """Return the files by name, made once: random bytes, as weights are."""
    folder = work.folder / "storage"
    folder.mkdir(exist_ok=True)
    files = {f"model-{number}.safetensors": folder / f"model-{number}.safetensors" for number in range(_NUM_FILES)}
    size = _FILE_BYTES[work.size.name]
    for number, path in enumerate(files.values()):
        if not path.is_file() or path.stat().st_size != size:
            path.write_bytes(np.random.default_rng(number).bytes(size))
    return files


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """Run a server whose data is gone afterwards; os.environ leads to it."""
    from pipelines.demo.object_store import running_object_store

    with (
        tempfile.TemporaryDirectory(dir=folder) as data,
        running_object_store(Path(data)) as store,
        patch.dict("os.environ", store.environment()),
    ):
        yield store.bucket


def ours_upload(folder: Path) -> Timed:
    """Publish the files: digests, uploads, the manifest."""
    from dice_core.storage.manifest import Manifest, publish_files

    work = Work(folder)
    files = _model(work)
    with _server(folder) as bucket, stopwatch() as watch:
        manifest = publish_files(f"s3://{bucket}/model", files, Manifest(stage="model", fingerprint="", files={}))
    return _timed(watch, {name: entry.sha256 for name, entry in manifest.files.items()})


def ours_download(folder: Path) -> Timed:
    """Fetch the files that a manifest names, and check them."""
    from dice_core.storage.manifest import Manifest, fetch_files, publish_files

    work = Work(folder)
    files = _model(work)
    with _server(folder) as bucket, tempfile.TemporaryDirectory(dir=folder) as target:
        uri = f"s3://{bucket}/model"
        manifest = publish_files(uri, files, Manifest(stage="model", fingerprint="", files={}))
        with stopwatch() as watch:
            fetch_files(uri, manifest, Path(target))
    return _timed(watch, {name: entry.sha256 for name, entry in manifest.files.items()})


def boto3_upload(folder: Path) -> Timed:
    """Upload one file after another with boto3 as it comes, then take its digest."""
    files = _model(Work(folder))
    with _server(folder) as bucket:
        client = _client()
        with stopwatch() as watch:
            digests = {}
            for name, path in files.items():
                client.upload_file(str(path), bucket, f"model/{name}")
                digests[name] = _digest(path)
    return _timed(watch, digests)


def boto3_download(folder: Path) -> Timed:
    """Download one file after another with boto3 as it comes, then take its digest."""
    files = _model(Work(folder))
    with _server(folder) as bucket, tempfile.TemporaryDirectory(dir=folder) as target:
        client = _client()
        for name, path in files.items():
            client.upload_file(str(path), bucket, f"model/{name}")
        with stopwatch() as watch:
            digests = {}
            for name in files:
                client.download_file(bucket, f"model/{name}", str(Path(target) / name))
                digests[name] = _digest(Path(target) / name)
    return _timed(watch, digests)


def _client() -> Any:
    import boto3

    return boto3.session.Session().client("s3")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _timed(watch: Stopwatch, digests: Values) -> Timed:
    return Timed.of(watch, {"digests": digests})


def same_files(ours: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether a digest differs."""
    return "" if [values["digests"] for values in ours] == [values["digests"] for values in peer] else "other files"


COMPARISONS = [
    Comparison(
        "storage",
        f"boto3's {kind}_file for each file, then SHA-256; a model of four files, {direction} an S3 server here",
        ours=(f"storage:ours_{kind}",),
        peer=(f"storage:boto3_{kind}",),
        clock="part",
        check=same_files,
    )
    for kind, direction in (("upload", "to"), ("download", "from"))
]

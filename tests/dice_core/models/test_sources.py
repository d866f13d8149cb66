"""What a source is, and the Hub: its real client against a small server that answers as the Hub does."""

import errno
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from dice_core.models import sources as model_sources
from dice_core.models.fitting import CHECKS
from dice_core.models.importing import import_model
from dice_core.models.sources import ModelError, Source, _explain_hub, find_source
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files

pytestmark = pytest.mark.slow

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
# As many published models are: an index with its shards, and the weights once more in two other forms.
_FILES = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "model.safetensors.index.json": _INDEX,
    "model-00001-of-00001.safetensors": "weights",
    "consolidated.safetensors": "weights",
    "pytorch_model.bin": "weights",
    "custom.py": "code",
    "original/params.json": "{}",
}
_PICKLED = {"config.json": "{}", "pytorch_model.bin": "weights"}


class _Hub(http.server.BaseHTTPRequestHandler):
    """The four answers of the Hub that a download needs: revision, tree, file, refusal."""

    downloaded: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        name, files = "/".join(path[:2]), _PICKLED if path[1] == "pickled" else _FILES
        if path[1] in ("gated", "absent"):
            code = {"gated": "GatedRepo", "absent": "RepoNotFound"}[path[1]]
            return self._answer(403 if path[1] == "gated" else 404, b"", {"X-Error-Code": code})
        if path[2] == "revision" and path[3] not in ("main", "v1", _COMMIT):
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path[2] == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self._answer(200, json.dumps({"id": name, "sha": _COMMIT, "siblings": siblings}).encode())
        if path[2] == "tree":
            entries = [{"type": "file", "path": f, "size": len(text), "oid": f} for f, text in files.items()]
            return self._answer(200, json.dumps(entries).encode())
        file = "/".join(path[4:])
        if self.command == "GET":
            self.downloaded.append(f"{name}/{file}")
        return self._answer(200, files[file].encode(), {"X-Repo-Commit": _COMMIT, "ETag": f'"{file}"'})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for header in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Return the address of a Hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


_BRING = """
import sys
from pathlib import Path
from dice_core.models.sources import *
try:
    print(bring(find_source(sys.argv[1], sys.argv[2]), Path(sys.argv[3]), len(sys.argv) > 4))
except ModelError as error:
    print(error)
"""


def _bring(source: str, revision: str, folder: Path, variables: dict[str, str], *with_code: str) -> str:
    """Bring a model in a process of its own: the Hub's client reads its variables when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    printed = subprocess.check_output(
        [sys.executable, "-c", _BRING, source, revision, str(folder), *with_code],
        env={**environment, "HF_HOME": str(folder), **variables},
        cwd=Path(model_sources.__file__).parents[2],
        text=True,
        timeout=60,
    )
    return printed.strip()


def test_of_a_hub_model_only_what_is_wanted_is_downloaded_and_once(hub: str, tmp_path: Path) -> None:
    _Hub.downloaded.clear()
    folders = {_bring("org/model", revision, tmp_path, {"HF_ENDPOINT": hub}) for revision in ("", "v1", _COMMIT)}

    assert sorted(_Hub.downloaded) == [
        "org/model/config.json",
        "org/model/model-00001-of-00001.safetensors",
        "org/model/model.safetensors.index.json",
        "org/model/tokenizer.json",
    ]
    (folder,) = folders
    assert Path(folder).name == _COMMIT
    assert Path(folder, "model-00001-of-00001.safetensors").read_text() == "weights"


def test_code_of_a_hub_model_is_downloaded_only_when_it_is_allowed(hub: str, tmp_path: Path) -> None:
    folder = Path(_bring("org/model", "", tmp_path, {"HF_ENDPOINT": hub}, "with code"))

    assert (folder / "custom.py").read_text() == "code"


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("org/absent", "", "org/absent: no such folder here and no such model on the Hub"),
        ("org/gated", "", "org/gated: access is restricted: accept its terms on the Hub and set HF_TOKEN"),
        ("org/model", "v9", "org/model@v9: the model has no such revision"),
        ("org/pickled", "", "org/pickled: its weights are pickle files (pytorch_model.bin)"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(hub: str, tmp_path: Path, source: str, revision: str, message: str) -> None:
    printed = _bring(source, revision, tmp_path, {"HF_ENDPOINT": hub})

    assert printed.startswith(message) and "\n" not in printed


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_hub_out_of_reach_is_one_line(tmp_path: Path, variables: dict[str, str]) -> None:
    start = time.monotonic()
    printed = _bring("org/model", "v1", tmp_path, variables)

    assert printed.startswith("org/model@v1: no such folder here, and the Hub cannot be reached (")
    assert "\n" not in printed
    # By itself, the Hub's client tries again for half a minute.
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("source", "revision", "fault"),
    [
        ("", "", "source: is empty; allowed: a Hub id"),
        (" ", "main", "source: is empty; allowed: a Hub id"),
        ("/no/such/folder", "", "no such folder; allowed: a Hub id"),
        ("no-such-folder", "", "no such folder; allowed: a Hub id"),
        ("./no-such-folder", "", "no such folder; allowed: a Hub id"),
        ("../no-such-folder", "", "no such folder; allowed: a Hub id"),
        ("s3:/bucket/model", "", "no such folder; allowed: a Hub id"),
        ("weights.gguf", "", "no such file"),
        ("models/weights.gguf", "", "no such file"),
        ("/", "main", "revision 'main' is only for models of the Hub"),
    ],
)
def test_a_source_that_is_none_is_explained(source: str, revision: str, fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        find_source(source, revision)


def test_a_folder_is_preferred_to_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source("org/model", "").kind == "hub"
    (tmp_path / "org" / "model").mkdir(parents=True)

    assert find_source("org/model", "").kind == "folder"


def test_a_folder_with_a_changed_file_is_another_source(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = find_source(str(tmp_path), "").identity
    assert find_source(f"file://{tmp_path}", "").identity == first
    (tmp_path / "model.safetensors").write_bytes(b"2")
    os.utime(tmp_path / "model.safetensors", ns=(0, 1))

    assert find_source(str(tmp_path), "").identity != first


def test_a_gguf_file_is_the_same_source_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"same")

    assert find_source(str(tmp_path / "one.gguf"), "").identity == find_source(str(tmp_path / "two.gguf"), "").identity


def test_a_full_disk_is_not_blamed_on_the_hub() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    explained = _explain_hub(Source("hub", "org/model", "", ""), error)
    assert explained.startswith("org/model: the download cannot be kept in ")
    assert f"(No space left on device): make room there, let user {os.geteuid()} write there, or set" in explained


def test_a_revision_that_somebody_imported_is_taken_by_whoever_asks_for_none(tmp_path: Path) -> None:
    """As on a site without the internet: the Hub is not asked."""
    uri = str(tmp_path / "model")
    settings = {"source": "org/model", "revision": "v1", "trust_remote_code": True}
    made = Manifest(stage="import-model", fingerprint="v1", files={}, settings=settings, checks=CHECKS)
    published = publish_files(uri, {}, made)
    assert import_model("org/model", uri) == published
    with pytest.raises(StorageError, match=r"holds a model from org/model@v1, not from org/model@v2:"):
        import_model("org/model", uri, revision="v2")
    with pytest.raises(StorageError, match=r"holds a model from org/model@v1, not from org/other:"):
        import_model("org/other", uri)

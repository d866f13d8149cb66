"""`dice push`: what would be sent, who is refused, and what a Hub gets, spoken to by the Hub's own client."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dice_core import cli
from dice_core.models.importing import import_model
from dice_core.storage import layout
from dice_core.storage.manifest import require_manifest
from tests.finished_run import BETTER, NOT_SHOWN, REFUSED, FinishedRun, publish


@pytest.fixture
def run(tmp_path):
    return FinishedRun(str(tmp_path))


def dice(capsys, *words):
    code = cli.main(["push", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_dry_run_shows_repository_files_and_card_and_asks_nobody(run, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    policy = run.iterate(1, BETTER)
    code, out, _ = dice(capsys, "--model", policy, "--repository", "me/aligned", "--dry-run")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [f"would send {policy}", lines[1]]
    assert lines[1].startswith("to me/aligned, branch main, private where it is made: 4 files, 0.0 MB")
    assert [line.split()[0] for line in lines[2:6]] == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert 'base_model: "org/zephyr-dpo"' in out and "**better**" in out
    assert "metrics.jsonl" not in out, "is no part of the model"
    assert run.root not in out.replace(policy, ""), "the card tells nobody where our storage is"
    values = json.loads(dice(capsys, "--model", policy, "--repository", "me/aligned", "--dry-run", "--json")[1])
    assert (values["public"], values["files"]["model.safetensors"], values["dry_run"]) == (False, 9, True)


def test_a_model_that_its_evaluation_refused_needs_force_and_a_reason(run, capsys):
    policy = run.iterate(1, REFUSED)
    options = ("--model", policy, "--repository", "me/aligned", "--dry-run")
    code, _, err = dice(capsys, *options)
    assert code == 1 and err.count("\n") == 1
    assert "not sent: " in err and "refused it (answers grew by 82.0%)" in err
    assert "needs --reason" in dice(capsys, *options, "--force")[2]
    assert dice(capsys, *options, "--force", "--reason", "for a study")[0] == 0


def with_adapter(policy: str) -> str:
    """Publish a policy anew, as training with adapters does."""
    manifest = require_manifest(policy)
    settings = {**manifest.settings, "training": {"lora_rank": 16}}
    files = {**FinishedRun.files(1), "adapter/adapter_model.safetensors": "A and B"}
    files["adapter/adapter_config.json"] = json.dumps(
        {"r": 16, "base_model_name_or_path": "s3://ours", "revision": None}
    )
    publish(policy, "train", files, settings=settings, inputs=manifest.inputs)
    return policy


def test_an_adapter_goes_alone_with_the_hub_s_name_of_its_base(run, capsys):
    options = ("--repository", "me/aligned", "--adapter", "--dry-run")
    policy = run.iterate(1)
    assert "has no adapter: it was trained with training.lora_rank 0" in dice(capsys, "--model", policy, *options)[2]
    code, out, _ = dice(capsys, "--model", with_adapter(policy), *options)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:5]] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert 'library_name: "peft"' in out and 'base_model: "org/zephyr-dpo"\nbase_model_relation: "adapter"' in out
    assert "This is its LoRA adapter of rank 16 alone, for org/zephyr-dpo" in out
    # The second policy's adapter belongs to the first, which nobody on the Hub has.
    run.policy = f"{policy}@{require_manifest(policy).content_digest}"
    code, _, err = dice(capsys, "--model", with_adapter(run.iterate(2)), *options)
    assert code == 1 and err.count("\n") == 1
    assert f"its adapter belongs to {policy}, which did not come from the Hub" in err


@pytest.mark.parametrize("verdict", [None, NOT_SHOWN])
def test_a_model_that_nobody_refused_may_go(verdict, run, capsys):
    assert dice(capsys, "--model", run.iterate(1, verdict), "--repository", "me/aligned", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--repository", "aligned"), "--repository: must be ORG/NAME, got 'aligned'"),
        (("--repository", "me/aligned", "--model", "data"), "holds no model but the result of prepare-data"),
        (("--repository", "me/aligned", "--model", "elsewhere"), "no manifest.json there"),
    ],
)
def test_what_cannot_be_sent_is_one_line(words, fault, run, capsys):
    policy = run.iterate(1, BETTER)
    model = f"{run.uri}/{words[3]}" if len(words) > 2 else policy
    code, _, err = dice(capsys, *words[:2], "--model", model)
    assert code == 1 and err.count("\n") == 1 and fault in err


def test_without_a_token_nothing_is_tried(run, capsys, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    _, _, err = dice(capsys, "--model", run.iterate(1, BETTER), "--repository", "me/aligned")
    assert "me/aligned: no token for the Hub: set HF_TOKEN" in err


class Hub(ThreadingHTTPServer):
    """The calls of the Hub's API that a commit takes, and what came in by them. Large files go where LFS says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, values: Any, status: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        is_known = name in self.server.private
        self._answer({"id": name, "private": self.server.private.get(name), "siblings": []}, 200 if is_known else 404)

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self._body()
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}" if values.get("organization") else values["name"]
            known = name in self.server.private
            self.server.private.setdefault(name, values["visibility"] == "private")
            self._answer({"url": f"{self.server.url}/{name}", "id": name}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/models/me/aligned/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [_preupload(name) for name in names]})
        elif path == "/me/aligned.git/info/lfs/objects/batch":
            self._answer({"transfer": "basic", "objects": [self._lfs(entry) for entry in json.loads(body)["objects"]]})
        elif path == "/api/models/me/aligned/commit/main":
            self.server.tokens.add(self.headers.get("Authorization", ""))
            for line in map(json.loads, body.splitlines()):
                self._commit(line["key"], line["value"])
            self._answer({"commitUrl": f"{self.server.url}/me/aligned/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"error": f"unknown call {path}"}, 404)

    def _lfs(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "actions": {"upload": {"href": f"{self.server.url}/blobs/{entry['oid']}"}}}

    def _commit(self, key: str, value: dict[str, Any]) -> None:
        if key == "header":
            self.server.messages.append(value["summary"])
        elif key == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.server.files[value["path"]] = self.server.blobs[value["oid"]]


def _preupload(name: str) -> dict[str, Any]:
    mode = "lfs" if name.endswith(".safetensors") else "regular"
    return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def push_to(hub: Hub, policy: str, home: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: the Hub's client reads its address when it is imported."""
    command = [sys.executable, "-m", "dice_core.cli", "push", "--model", policy, "--repository", "me/aligned", *words]
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1", "HF_HOME": home}
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_hub_gets_an_adapter_where_its_library_looks_for_it(hub, run, tmp_path):
    done = push_to(hub, with_adapter(run.iterate(1)), str(tmp_path), "--adapter")
    assert done.returncode == 0, done.stderr
    assert hub.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files["adapter_model.safetensors"] == b"A and B"
    config = json.loads(hub.files["adapter_config.json"])
    assert config == {"r": 16, "base_model_name_or_path": "org/zephyr-dpo", "revision": "0a1b2c"}


@pytest.mark.slow
def test_the_hub_gets_the_model_file_for_file_and_a_private_repository(hub, tiny_model, s3, tmp_path):
    policy = layout.model(f"{s3}/{tmp_path.name}", "tiny")
    import_model(str(tiny_model), policy)

    def push(*words: str) -> subprocess.CompletedProcess[str]:
        return push_to(hub, policy, str(tmp_path), *words)

    done = push("--force", "--reason", "a test")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"sent: {hub.url}/me/aligned/commit/{'0' * 40}\n"
    assert hub.private == {"me/aligned": True}
    entries = require_manifest(policy).files
    assert hub.files.keys() == {*entries, "README.md"}
    assert all(hashlib.sha256(hub.files[name]).hexdigest() == entry.sha256 for name, entry in entries.items())
    assert b"It has not been evaluated." in hub.files["README.md"]
    assert hub.messages == [f"Model {require_manifest(policy).content_digest[:12]} (forced: a test)"]
    assert hub.tokens == {"Bearer hf_secret"}
    # Somebody has opened the repository since.
    hub.private["me/aligned"] = False
    done = push()
    assert (done.returncode, done.stdout) == (1, "")
    assert "dice: error: me/aligned: is public: --public says that this model may be" in done.stderr
    assert "hf_secret" not in done.stderr
    hub.shutdown()
    hub.server_close()
    done = push()
    assert done.returncode == 1
    assert "dice: error: me/aligned: cannot reach the Hub" in done.stderr

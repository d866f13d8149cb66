"""A real `mlflow server` on this machine, for the tests that speak its REST API.

MLflow does not fit into the project's lock: it gets an environment of its own in .cache, made once from mlflow.lock
(some ten seconds and 0.8 GB). Where the package index cannot be reached, the tests that need it are skipped. Other
programs that tests only talk to are installed the same way.
"""

import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
from filelock import FileLock

from dice_core.child_processes import end_with_parent

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "tests" / "mlflow.lock"
_ENVIRONMENTS = ROOT / ".cache" / "environments"
# What uv says of an index that does not answer; anything else is a fault of the lock.
_UNREACHABLE = (
    "error sending request",
    "Could not connect",
    "Failed to fetch",
    "Request failed",
    "operation timed out",
)
_READY_SECONDS, _STOP_SECONDS = 180, 10


@dataclass(frozen=True)
class MlflowServer:
    """A running server with an empty store."""

    uri: str

    def get(self, path: str, **parameters: Any) -> dict[str, Any]:
        """Call the REST API, such as `experiments/get-by-name`; an error of HTTP is raised."""
        return _answer(requests.get(self._url(path), params=parameters, timeout=60))

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Call the REST API with a body, such as `runs/search`; an error of HTTP is raised."""
        return _answer(requests.post(self._url(path), json=body, timeout=60))

    def runs(self, experiment: str) -> list[dict[str, Any]]:
        """Return all runs of an experiment, the oldest first, params and tags as dicts; none where there is none."""
        found = self.post("experiments/search", filter=f"name = '{experiment}'", max_results=1).get("experiments", [])
        ids = [entry["experiment_id"] for entry in found]
        runs = (
            self.post("runs/search", experiment_ids=ids, max_results=1000, order_by=["start_time ASC"]) if ids else {}
        )
        return [
            {
                **run["info"],
                "params": {entry["key"]: entry["value"] for entry in run["data"].get("params", [])},
                "tags": {entry["key"]: entry["value"] for entry in run["data"].get("tags", [])},
                "metrics": {entry["key"]: entry["value"] for entry in run["data"].get("metrics", [])},
            }
            for run in runs.get("runs", [])
        ]

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Return the steps and values of a metric, in the order of the steps."""
        answer = self.get("metrics/get-history", run_id=run_id, metric_key=metric, max_results=10_000)
        return sorted((int(entry["step"]), float(entry["value"])) for entry in answer.get("metrics", []))

    def _url(self, path: str) -> str:
        return f"{self.uri}/api/2.0/mlflow/{path}"


def _answer(response: requests.Response) -> dict[str, Any]:
    if not response.ok:
        raise AssertionError(f"{response.url}: {response.status_code} {response.text}")
    values: dict[str, Any] = response.json()
    return values


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """Run `mlflow server` for the session; tests keep apart by the names of their experiments and models."""
    with running_mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@contextmanager
def running_mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Run a server that keeps its store in a folder; where no package index answers, the test is skipped."""
    python, port = python_of(LOCK), free_port()
    command = [str(python), "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"]
    # Without jobs it is one process less; without telemetry it calls nobody.
    variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTHONPATH"))}
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**inherited, **variables},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        )
    try:
        server = MlflowServer(f"http://127.0.0.1:{port}")
        _wait_until_ready(server, process, log)
        yield server
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(server: MlflowServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{server.uri}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"mlflow server did not come up:\n{log.read_text(errors='replace')[-4000:]}")


def python_of(lock: Path) -> Path:
    """Return the Python of an environment that holds a lock's packages; made where it is not there yet."""
    digest = hashlib.sha256(f"{sys.version}\n{lock.read_text()}".encode()).hexdigest()[:12]
    folder = _ENVIRONMENTS / f"{lock.stem}-{digest}"
    python, complete = folder / "bin" / "python", folder / ".complete"
    _ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with FileLock(_ENVIRONMENTS / "making.lock"):
        if not complete.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _make_environment(lock, folder, python)
            complete.touch()
    return python


def _make_environment(lock: Path, folder: Path, python: Path) -> None:
    uv, environment = [sys.executable, "-m", "uv"], _without_bytecode_ban()
    subprocess.run([*uv, "venv", "--quiet", f"--python={sys.executable}", folder], check=True, env=environment)
    # uv does not read pip's configuration. Modules are compiled now: each start would compile them again.
    index = _installer().pip_config(Path(sys.executable)).get("index-url")
    install = [*uv, "pip", "install", "--quiet", "--no-deps", "--compile-bytecode", f"--python={python}", "-r", lock]
    install += ["--default-index", index] if index else []
    done = subprocess.run(install, capture_output=True, text=True, check=False, env=environment)
    if done.returncode and any(words in done.stderr for words in _UNREACHABLE):
        pytest.skip(f"{lock.name} cannot be installed, the package index does not answer: {done.stderr.strip()[:300]}")
    assert not done.returncode, f"{lock}: cannot be installed:\n{done.stderr}"


def _without_bytecode_ban() -> dict[str, str]:
    banned = {"PYTHONDONTWRITEBYTECODE": "", "UV_LINK_MODE": "copy"}
    return {**os.environ, **banned}


def _installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def without_trackers(environment: Mapping[str, str]) -> list[str]:
    """Return the variables of a person's own trackers, which no test may write to."""
    return [name for name in environment if name.startswith(("MLFLOW_", "WANDB_"))]

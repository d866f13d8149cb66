"""A real `mlflow server` on this machine, for the tests that speak its REST API.

MLflow does not fit into the project's lock: it gets an environment of its own in .cache, made once from mlflow.lock
(some ten seconds and 0.8 GB). Where the package index cannot be reached, the tests that need it are skipped.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from dice_core.child_processes import end_with_parent
from tests.locked_environment import ROOT, python_of

LOCK = ROOT / "tests" / "mlflow.lock"
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
    python, port = python_of(LOCK), _free_port()
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


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def without_trackers(environment: Mapping[str, str]) -> list[str]:
    """Return the variables of a person's own trackers, which no test may write to."""
    return [name for name in environment if name.startswith(("MLFLOW_", "WANDB_"))]

"""A cluster for the launcher of training: an API server, an operator whose pods are local processes, what they run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes_api.controllers import Controllers
from tests.kubernetes_api.server import ApiServer
from tests.kubernetes_api.trainer import Trainer
from tests.kubernetes_api.training_operator import TrainingOperator
from tests.launchers import SETTINGS, Make, write_job

_WORKER = """
import os, sys, time
from pathlib import Path
from typing import Any

folder, node = Path(sys.argv[1]).parent, os.environ["PET_NODE_RANK"]
folder.joinpath(f"pid-{node}").write_text(str(os.getpid()))
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    for name in ("KUBERNETES_SERVICE_HOST", "POD_NAME", "POD_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    with ApiServer(tmp_path) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        yield server


@pytest.fixture(params=["pytorchjob", "trainjob"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the backend that launchers take, one after the other."""
    monkeypatch.setitem(SETTINGS, "backend", request.param)
    return str(request.param)


@pytest.fixture
def operator(server: ApiServer, tmp_path: Path, backend: str) -> Iterator[Controllers]:
    """Start who controls the jobs of the backend."""
    variables = {"DICE_CACHE": str(tmp_path / "cache"), "DICE_SCRATCH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with {"pytorchjob": TrainingOperator, "trainjob": Trainer}[backend](server, variables) as operator:
        yield operator


@pytest.fixture
def job_uri(tmp_path: Path) -> str:
    return write_job(tmp_path / "train")


@pytest.fixture
def worker(tmp_path: Path) -> Make:
    """Return a function that makes a script of a worker's last lines, and returns the command to run it."""

    def make(body: str) -> tuple[str, ...]:
        path = tmp_path / "worker.py"
        path.write_text(_WORKER + body)
        return ("python", str(path))

    return make

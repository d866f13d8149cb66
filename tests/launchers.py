"""Launchers of training on a cluster, in a thread or in a process that can be killed, with little patience."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dice_core.launch.cluster_backend import ClusterBackend
from dice_core.launch.job_kind import JobKind
from dice_core.launch.job_kinds import JOB_KINDS
from dice_core.launch.kubernetes import JobPatience
from dice_core.launch.settings import LaunchConfig, parse_launch
from dice_core.storage.manifest import Manifest, publish_files
from dice_core.training.job import TrainingJob
from dice_core.training.settings import TrainingConfig
from tests.kubernetes_api.by_hand import wait_until
from tests.kubernetes_api.server import ApiServer
from tests.kubernetes_api.store import JOB, POD, TRAIN_JOB, Kind, Object

Make = Callable[[str], tuple[str, ...]]
"""Makes a script of a worker's last lines, and returns the command to run it."""
REPOSITORY = Path(__file__).parents[1]
PATIENCE = JobPatience(
    first_pause=0.05, longest_pause=0.2, give_up=20, poll=0.1, reminder=0.3, drain=5, stop=5, restart=0.1
)
STORED: dict[str, Kind] = {"pytorchjob": JOB, "trainjob": TRAIN_JOB}
"""What the API server keeps of the jobs of a backend."""
SETTINGS = {"backend": "pytorchjob", "image": "training:1"}


def write_job(folder: Path) -> str:
    """Store a job that is never trained, and return its URI."""
    training = TrainingConfig.parse({"max_steps": 2}, "training")
    fields = {"stage": "train", "fingerprint": "f1"}
    return TrainingJob(str(folder), "policy", "pairs", training, seed=1, manifest_fields=fields).write()


def publish_result(job_uri: str) -> None:
    """Leave what a training that has succeeded leaves, short of the model."""
    job = TrainingJob.read(job_uri)
    publish_files(job.output_uri, {}, Manifest(files={}, **job.manifest_fields))


def sections(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings of both sections as those of launch and those of the pods; no name is in both."""
    values = {**SETTINGS, **settings}
    launch = {name: value for name, value in values.items() if name in LaunchConfig.model_fields}
    return launch, {name: value for name, value in values.items() if name not in launch}


class Launcher(threading.Thread):
    """A launcher in a thread, and how it ended."""

    def __init__(
        self, job_uri: str, command: Sequence[str] = (), *, patience: JobPatience = PATIENCE, **settings: Any
    ) -> None:
        super().__init__(daemon=True)
        self._job_uri = job_uri
        self._launch, pods = parse_launch(*sections(settings))
        self._backend = ClusterBackend(pods, command, patience)
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._backend.run(self._job_uri, self._launch)
        except Exception as error:
            self.error = error

    def result(self, seconds: float = 120) -> None:
        self.join(seconds)
        assert not self.is_alive(), "the launcher has not ended"
        if self.error is not None:
            raise self.error


def start_process(
    job_uri: str,
    command: Sequence[str] = (),
    *,
    patience: JobPatience = PATIENCE,
    stderr: int | None = None,
    **settings: Any,
) -> subprocess.Popen[bytes]:
    """Start a launcher that can be killed."""
    code = (
        "from dice_core.launch.kubernetes import JobPatience; from dice_core.launch.settings import parse_launch;"
        "from dice_core.launch.cluster_backend import ClusterBackend;"
        f"launch, pods = parse_launch(*{sections(settings)!r});"
        f"ClusterBackend(pods, {tuple(command)!r}, {patience!r}).run({job_uri!r}, launch)"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=dict(os.environ), stderr=stderr)


def shown(captured: str, name: str) -> list[str]:
    """Return the lines that were shown of a process."""
    return [line.removeprefix(f"[{name}] ") for line in captured.splitlines() if line.startswith(f"[{name}] ")]


def pods(server: ApiServer) -> list[Object]:
    return server.store.find(POD, "default")


def running(server: ApiServer, number: int = 1) -> list[str]:
    """Wait until so many pods run, and return their names."""

    def found() -> list[str]:
        return [pod["metadata"]["name"] for pod in pods(server) if pod["status"]["phase"] == "Running"]

    wait_until(lambda: len(found()) == number)
    return found()


def kind() -> JobKind:
    """Return the kind of jobs that launchers make by default."""
    return JOB_KINDS[SETTINGS["backend"]]


def jobs(server: ApiServer) -> list[Object]:
    return server.store.find(STORED[SETTINGS["backend"]], "default")


def num_created(server: ApiServer) -> int:
    return server.count("POST", f"/{kind().plural}")

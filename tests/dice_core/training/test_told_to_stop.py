"""Pods of training that are told to stop, or whose store is away: real processes by torchrun, a real S3 server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file

from dice_core.launch.launch import launch_training
from dice_core.launch.pytorchjob import PYTORCH_JOB
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.models.importing import import_model
from dice_core.storage.address import open_storage
from dice_core.storage.manifest import fetch_files, require_manifest
from dice_core.training.job import TrainingJob
from tests.dice_core.training.pair_rows import make_rows, write_rows
from tests.dice_core.training.test_worker import make_job
from tests.faulty_store import KillableStore

pytestmark = pytest.mark.slow

Start = Callable[[TrainingJob], subprocess.Popen[str]]
ROOT = Path(__file__).parents[3]
LAUNCH = LaunchConfig(processes_per_node=2)
SETTINGS = {"max_steps": 60, "eval_steps": 1000}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KillableStore]:
    """Return a server of this test's own, which os.environ leads to."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killable = KillableStore(tmp_path / "store")
    for name, value in killable.environment().items():
        monkeypatch.setenv(name, value)
    yield killable
    killable.stop()


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path, store: KillableStore) -> TrainingJob:
    """Return a job whose result goes to the server."""
    import_model(str(tiny_model), str(tmp_path / "policy"))
    pairs_uri = write_rows(make_rows(), tmp_path / "pairs.parquet")
    return replace(make_job(tmp_path, str(tmp_path / "policy"), pairs_uri, SETTINGS), output_uri="s3://dice/train")


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts what a training pod runs, with the variables that it has there."""
    started: list[subprocess.Popen[str]] = []

    def begin(job: TrainingJob) -> subprocess.Popen[str]:
        body = PYTORCH_JOB.body("dice-x", job.write(), LAUNCH, PodConfig(image="train:1"), environment={})
        [container] = body["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
        of_torch = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"].startswith("TORCH_")}
        command = [sys.executable, *container["command"][1:]]
        environment = {**os.environ, **of_torch}
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_for(lines: IO[str] | None, text: str, said: list[str]) -> None:
    """Read lines until one has the text."""
    for line in lines or ():
        said.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} was not said:\n{''.join(said)}")


def test_a_pod_told_to_stop_stores_the_step_it_is_at_before_it_ends(
    job: TrainingJob, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "machine-1"))
    process, said = start(job), list[str]()
    wait_for(process.stdout, "reference log-probs: 12 of 12", said)
    time.sleep(0.5)  # its first step begins now
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "published" not in rest
    assert "told to stop; what is being stored is finished first" in rest
    stored = {found.key for found in open_storage("s3://dice/train/checkpoints").list()}
    (first,) = [key for key in stored if key.endswith("rank-0/manifest.json")]
    assert first.replace("rank-0", "rank-1") in stored

    # Another machine goes on from it, and ends with the weights of a run that nothing stopped.
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "machine-2"))
    again, said = start(job), []
    wait_for(again.stdout, f"resuming from {first.partition('/')[0]}", said)
    rest, _ = again.communicate(timeout=100)
    assert again.returncode == 0, rest
    whole = replace(job, output_uri=str(tmp_path / "whole"))
    launch_training(whole.write(), LAUNCH)
    fetch_files("s3://dice/train", require_manifest("s3://dice/train"), tmp_path / "resumed")
    resumed, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "whole"))
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())


def test_a_pod_told_to_stop_finishes_the_copy_that_is_on_its_way(
    job: TrainingJob, store: KillableStore, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "machine-1"))
    job = replace(job, training=job.training.model_copy(update={"save_steps": 5, "max_steps": 4000}))
    process, said = start(job), list[str]()
    wait_for(process.stdout, "starting at step 0", said)
    store.kill()
    written = job.scratch_folder() / "checkpoints" / "checkpoint-5"
    while not all((written / f"complete-{rank}.json").exists() for rank in range(2)):
        assert process.poll() is None, "".join(said)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    wait_for(process.stdout, "told to stop; what is being stored is finished first", said)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert [path.name for path in written.parent.iterdir()] == [written.name], "training went on without another one"
    store.start()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "published" not in rest
    stored = {found.key for found in open_storage("s3://dice/train/checkpoints").list()}
    assert {f"checkpoint-5/rank-{rank}/manifest.json" for rank in range(2)} <= stored


def test_a_pod_told_to_stop_before_its_first_step_ends_at_once(job: TrainingJob, start: Start, tmp_path: Path) -> None:
    process, said = start(job), list[str]()
    wait_for(process.stdout, "train: ", said)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "published" not in rest

"""A training that is followed: its curves are metrics.jsonl's, of rank 0 alone; a tracker that is away ends nothing."""

import json
import socket
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dice_core.launch.launch import launch_training
from dice_core.launch.settings import LaunchConfig
from dice_core.storage.address import open_storage
from dice_core.tracking.event_file import read_events
from dice_core.training.live_metrics import metric_lines
from dice_core.training.worker import run_training
from tests.dice_core.training.test_worker import make_job
from tests.mlflow_server import MlflowServer

pytestmark = pytest.mark.usefixtures("one_thread")


def lines_of(uri: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in open_storage(uri).read_bytes("metrics.jsonl").decode().splitlines()]


def curves(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and value is not None:
                found.setdefault(name, []).append((line["step"], value))
    return found


@pytest.mark.slow
def test_curves_in_storage_and_at_mlflow_are_those_of_metrics_jsonl_and_of_rank_0_alone(
    mlflow_server: MlflowServer, policy_uri: str, pairs_uri: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, uri = f"training-{uuid.uuid4().hex[:8]}", f"{s3}/runs/followed/iteration-1/train"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", experiment)
    job = make_job(Path("unused"), policy_uri, pairs_uri, {"eval_steps": 2, "logging_steps": 1})
    job = type(job)(**{**vars(job), "output_uri": uri})
    launch_training(job.write(), LaunchConfig(processes_per_node=2))
    expected = curves(lines_of(uri))
    assert {"loss", "rewards/accuracies", "eval_loss", "start_loss", "grad_norm", "epoch"} <= expected.keys()
    (_, stage) = mlflow_server.runs(experiment)
    names = [name for name in stage["metrics"] if not name.startswith("system/")]
    assert {name: mlflow_server.history(stage["run_id"], name) for name in names} == expected
    events = read_events(open_storage(uri).read_bytes("tensorboard/events.out.tfevents.dice"))
    found = curves([{"step": event.step, **event.values} for event in events])
    assert found == {
        name: [(step, float(np.float32(value))) for step, value in points] for name, points in expected.items()
    }


@pytest.mark.slow
def test_a_tracker_that_never_answers_and_one_that_is_not_there_end_no_training(
    policy_uri: str,
    pairs_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_training(make_job(tmp_path / "untracked", policy_uri, pairs_uri, {}))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {"silent": silent.getsockname()[1], "dead": 9}
        for name, port in ports.items():
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
            run_training(make_job(tmp_path / name, policy_uri, pairs_uri, {}))
    told = capfd.readouterr().err
    assert told.count(f"mlflow: http://127.0.0.1:{ports['dead']}: no answer (ConnectionError): the work goes on") == 1
    num_lines = len(lines_of(str(tmp_path / "untracked")))
    for port in ports.values():
        assert told.count(f"mlflow: http://127.0.0.1:{port}: {num_lines} lines of metrics were not sent") == 1
    assert "secret" not in told
    speeds = ("tokens_per_second", "peak_memory_bytes")
    untracked, *others = (
        [{name: value for name, value in line.items() if name not in speeds} for line in lines_of(str(tmp_path / name))]
        for name in ("untracked", *ports)
    )
    assert all(lines == untracked for lines in others)


def test_a_line_has_passes_over_the_pairs_no_nan_and_the_summary_is_none() -> None:
    history = [
        {"step": 1, "epoch": 0.5, "loss": float("nan")},
        {"step": 2, "epoch": 1.0, "eval_loss": 0.25},
        {"step": 2, "epoch": 1.0, "train_loss": 0.5},
    ]
    assert list(metric_lines(history, 0.125)) == [
        {"step": 1, "epoch": 0.125, "loss": None},
        {"step": 2, "epoch": 0.25, "eval_loss": 0.25},
    ]

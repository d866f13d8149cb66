"""MLflow: against a real server what is stored and found again; against a recorder who we say we are."""

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dice_core import __version__
from dice_core.tracking import feed
from dice_core.tracking.mlflow_api import MlflowApi, MlflowError
from dice_core.tracking.mlflow_run import MlflowRuns, RunKey, flat
from dice_core.tracking.run_tracking import begin_run, end_run, tracked_stage, tracked_training
from tests.mlflow_server import MlflowServer

_LONG = 60.0


@pytest.fixture
def experiment(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an experiment of this test's own, at the server that the variables name."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    monkeypatch.setattr(feed, "_END_SECONDS", _LONG)
    monkeypatch.setattr(feed.Feed.end, "__kwdefaults__", {"seconds": _LONG, "tells": True})
    return name


RUN = "s3://bucket/prefix/runs/zephyr-1"
SETTINGS = {"training": {"beta": 0.1, "max_steps": 3, "betas": [0.9, 0.99]}, "seed": 7}


@pytest.mark.slow
def test_a_run_has_its_stages_below_it_with_settings_numbers_and_where_they_are(
    mlflow_server: MlflowServer, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "5f0c")
    begin_run(RUN, {"num_iterations": 2, "training": {"beta": 0.1}})
    with tracked_stage("train", f"{RUN}/iteration-2/train", "abc", SETTINGS) as tracked:
        tracked.describe({"last_loss": 0.25, "num_steps": 3, "noise": float("nan"), "reason": "a text", "none": None})
    parent, stage = mlflow_server.runs(experiment)
    assert (parent["run_name"], parent["status"]) == ("zephyr-1", "RUNNING")
    assert parent["params"] == {"num_iterations": "2", "training.beta": "0.1"}
    expected = {"dice.uri": RUN, "dice.run": "zephyr-1", "dice.version": __version__, "kfp.run_id": "5f0c"}
    assert expected.items() <= parent["tags"].items()
    assert parent["metrics"] == {"train/last_loss": 0.25, "train/num_steps": 3.0}
    assert mlflow_server.history(parent["run_id"], "train/last_loss") == [(2, 0.25)]
    assert (stage["run_name"], stage["status"]) == ("iteration-2/train", "FINISHED")
    assert stage["tags"]["mlflow.parentRunId"] == parent["run_id"]
    assert {"dice.stage": "train", "dice.fingerprint": "abc"}.items() <= stage["tags"].items()
    assert stage["params"] == {
        "training.beta": "0.1",
        "training.max_steps": "3",
        "training.betas": "[0.9, 0.99]",
        "seed": "7",
    }
    assert stage["metrics"] == {"last_loss": 0.25, "num_steps": 3.0}
    end_run(RUN, "FINISHED")
    assert [run["status"] for run in mlflow_server.runs(experiment)] == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_another_attempt_goes_on_with_the_same_run_and_adds_no_step_twice(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    place = f"{tmp_path}/runs/r/iteration-1/train"
    with pytest.raises(RuntimeError), tracked_stage("train", place, "abc", SETTINGS):
        with tracked_training(place, "abc", SETTINGS, tmp_path / "one") as curves:
            for step, loss in enumerate([0.7, 0.6, 0.5]):
                curves.put(step, {"loss": loss})
        raise RuntimeError("the node is gone")
    (parent, stage) = mlflow_server.runs(experiment)
    assert (parent["status"], stage["status"]) == ("RUNNING", "FAILED")
    with tracked_stage("train", place, "abc", SETTINGS) as tracked:
        with tracked_training(place, "abc", SETTINGS, tmp_path / "two") as curves:
            # The checkpoint kept step 1: steps 0 and 1 are told again, and 2 is trained again.
            for step, loss in enumerate([0.7, 0.6, 0.51, 0.4]):
                curves.put(step, {"loss": loss})
        tracked.describe({"loss": 9.0, "seconds": 2.0})
    (parent, stage) = mlflow_server.runs(experiment)
    assert stage["status"] == "FINISHED"
    assert mlflow_server.history(stage["run_id"], "loss") == [(0, 0.7), (1, 0.6), (2, 0.5), (3, 0.4)]
    # A number of the end is not a point of the curve of its name.
    assert mlflow_server.history(stage["run_id"], "seconds") == [(0, 2.0)]


@pytest.mark.slow
def test_other_settings_at_the_same_place_are_another_run(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    for fingerprint in ("abc", "def"):
        with tracked_stage("pair", f"{tmp_path}/runs/r/iteration-1/pair", fingerprint, SETTINGS):
            pass
    assert [run["run_name"] for run in mlflow_server.runs(experiment)] == ["r", "iteration-1/pair", "iteration-1/pair"]


@pytest.mark.slow
def test_eight_shards_that_start_at_once_have_one_parent(mlflow_server: MlflowServer, experiment: str) -> None:
    barrier = threading.Barrier(8)

    def shard(number: int) -> None:
        barrier.wait()
        place = f"{RUN}-shards/iteration-1/score/shard-{number}-of-8"
        with tracked_stage("score", place, "abc", {"seed": 0}, measures_machine=False) as tracked:
            tracked.describe({"num_scored": number})

    threads = [threading.Thread(target=shard, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = mlflow_server.runs(experiment)
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run["tags"])
    shards = [run for run in runs if run is not parent]
    assert len(shards) == 8 and {run["tags"]["mlflow.parentRunId"] for run in shards} == {parent["run_id"]}
    assert {run["status"] for run in shards} == {"FINISHED"}
    # One shard's number says nothing of the run.
    assert parent["metrics"] == {}


@pytest.mark.slow
def test_the_end_of_a_run_ends_the_stages_that_said_nothing(mlflow_server: MlflowServer, experiment: str) -> None:
    runs = MlflowRuns(MlflowApi(mlflow_server.uri, {}), os.environ)
    parent = RunKey("gone", {"dice.uri": f"{RUN}-gone"})
    runs.find_or_create(RunKey("iteration-1/score", {"dice.uri": "x"}, parent), {})
    end_run(f"{RUN}-gone", "FAILED")
    assert [run["status"] for run in mlflow_server.runs(experiment)] == ["FAILED", "KILLED"]


@pytest.mark.slow
def test_a_stage_that_is_told_to_stop_says_so_and_ends_by_the_signal(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    code = """
import sys, time
from dice_core.tracking.run_tracking import tracked_stage

with tracked_stage("score", sys.argv[1], "abc", {}) as tracked:
    while not tracked.feeds[0]._has_begun:
        time.sleep(0.01)
    print("begun", flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", code, f"{tmp_path}/runs/r/iteration-1/score"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.wait(_LONG) == -signal.SIGTERM
    assert [run["status"] for run in mlflow_server.runs(experiment)] == ["RUNNING", "KILLED"]


@pytest.mark.slow
def test_the_machine_is_measured_beside_the_work_and_attempts_are_counted_on(
    mlflow_server: MlflowServer, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = threading.Event()

    def metrics() -> dict[str, float]:
        measured.set()
        return {"system/cpu_utilization_percentage": 50.0}

    monkeypatch.setattr("dice_core.tracking.system_metrics.system_metrics", metrics)
    monkeypatch.setattr("dice_core.tracking.run_tracking.sampled.__wrapped__.__defaults__", (0.05,))
    for _ in range(2):
        measured.clear()
        with tracked_stage("score", f"{RUN}-machine/iteration-1/score", "abc", {}):
            assert measured.wait(_LONG)
    stage = mlflow_server.runs(experiment)[1]
    steps = [step for step, _ in mlflow_server.history(stage["run_id"], "system/cpu_utilization_percentage")]
    assert len(steps) >= 2 and steps == list(range(len(steps)))


@pytest.mark.slow
def test_an_experiment_can_be_named_by_its_id_and_one_that_is_deleted_is_told(
    mlflow_server: MlflowServer,
    experiment: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = mlflow_server.post("experiments/create", name=experiment)["experiment_id"]
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", found)
    with tracked_stage("pair", "/tmp/anywhere", "abc", {}):
        pass
    assert [run["run_name"] for run in mlflow_server.runs(experiment)] == ["/tmp/anywhere"]
    mlflow_server.post("experiments/delete", experiment_id=found)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", experiment)
    with tracked_stage("pair", "/tmp/anywhere", "abc", {}):
        pass
    assert "is deleted: restore it" in capfd.readouterr().err


class _Recorder(BaseHTTPRequestHandler):
    """Keeps the headers of requests, and answers as it is told to."""

    headers_seen: ClassVar[list[dict[str, str]]] = []
    answer: ClassVar[tuple[int, Any]] = (200, {})

    def do_GET(self) -> None:
        self.headers_seen.append(dict(self.headers))
        status, body = self.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def recorder() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Recorder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        _Recorder.headers_seen.clear()
        _Recorder.answer = (200, {})
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MLFLOW_TRACKING_TOKEN": "t0k"}, "Bearer t0k"),
        ({"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "pw"}, "Basic bWU6cHc="),
        # As MLflow's own client: a name wins over a token.
        (
            {"MLFLOW_TRACKING_TOKEN": "t", "MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "pw"},
            "Basic bWU6cHc=",
        ),
        ({}, None),
    ],
)
def test_the_credentials_of_mlflows_variables_are_sent_and_no_others(
    recorder: str, variables: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    MlflowApi(recorder, {**variables, "MLFLOW_WORKSPACE": "team"}).get("runs/get", run_id="a")
    (seen,) = _Recorder.headers_seen
    assert seen.get("Authorization") == expected
    assert seen["X-MLFLOW-WORKSPACE"] == "team"


def test_a_password_in_the_address_is_used_and_never_shown(recorder: str) -> None:
    api = MlflowApi(recorder.replace("://", "://me:pw@"), {})
    api.get("runs/get")
    assert _Recorder.headers_seen[0]["Authorization"] == "Basic bWU6cHc="
    assert api.where == recorder
    _Recorder.answer = (403, {"error_code": "PERMISSION_DENIED", "message": "not for you"})
    with pytest.raises(MlflowError) as refused:
        api.get("runs/get")
    assert str(refused.value) == "runs/get: 403 not for you" and refused.value.is_final
    away = MlflowApi("http://me:pw@127.0.0.1:9", {})
    with pytest.raises(MlflowError) as no_answer:
        away.get("runs/get")
    assert str(no_answer.value) == "no answer (ConnectionError)" and not no_answer.value.is_final


@pytest.mark.parametrize(("status", "is_final"), [(500, False), (503, False), (429, False), (401, True), (404, True)])
def test_what_may_pass_is_tried_again_and_what_stays_is_not(recorder: str, status: int, is_final: bool) -> None:
    _Recorder.answer = (status, b"<html>")
    with pytest.raises(MlflowError) as error:
        MlflowApi(recorder, {}).get("runs/get")
    assert error.value.is_final == is_final


def test_what_is_no_mlflow_server_is_told(recorder: str) -> None:
    _Recorder.answer = (200, b"<html>welcome</html>")
    with pytest.raises(MlflowError, match="is this an MLflow server"):
        MlflowApi(recorder, {}).get("runs/get")


@pytest.mark.parametrize("uri", ["databricks", "file:///tmp/mlruns", "sqlite:///a.db", "https://"])
def test_another_kind_of_address_is_told_and_nothing_is_tracked(
    uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with tracked_stage("pair", "/tmp/x", "abc", {}) as tracked:
        assert not tracked.feeds
    assert "MLFLOW_TRACKING_URI is no http:// or https:// address" in capfd.readouterr().err


def test_settings_become_params_by_their_full_names() -> None:
    settings = {
        "training": {"beta": 0.1, "none": None, "text": "a", "empty": {}, "list": [1, 2]},
        "seed": 1,
        "on": True,
    }
    assert dict(flat(settings)) == {
        "training.beta": "0.1",
        "training.none": "null",
        "training.text": "a",
        "training.empty": "{}",
        "training.list": "[1, 2]",
        "seed": "1",
        "on": "true",
    }

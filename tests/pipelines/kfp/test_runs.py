"""Which run a name means, and how it is stopped."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dice_core.launch.jobs import TrainingJobs
from dice_core.launch.kubernetes import KubernetesApi
from dice_core.launch.pytorchjob import PYTORCH_JOB
from dice_core.launch.settings import LaunchConfig, PodConfig
from pipelines.cli import main
from tests.cluster_objects import ClusterObjects, running_cluster
from tests.kfp_api import KfpServer, running_kfp_server
from tests.kubernetes_api.server import ApiServer
from tests.kubernetes_api.store import JOB

pytestmark = pytest.mark.slow


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    with running_kfp_server() as server:
        monkeypatch.setenv("KFP_HOST", server.host)
        monkeypatch.setenv("DICE_ROOT", "s3://bucket/dice")
        yield server


def submit(name: str) -> None:
    assert main(["submit", "--preset", "demo", "--run", name]) == 0


def add_run(server: KfpServer, name: str, state: str, second: int = 0) -> dict[str, Any]:
    """Put a run of a pipeline that is no longer there."""
    time = f"2026-01-01T00:00:{second:02d}Z"
    row = {"run_id": f"{name}-{second}", "display_name": name, "state": state, "created_at": time}
    server.runs.append(row)
    return row


def test_status_without_a_name_lists_the_latest_runs(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    add_run(server, "a", "SUCCEEDED")
    add_run(server, "b", "RUNNING", 5)
    assert main(["status"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["RUN", "STATE", "STARTED", "(UTC)"]
    assert [line[0] for line in lines[1:]] == ["b", "a"]


def test_status_without_any_run_says_so(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert capsys.readouterr().out == f"no runs at {server.host}: make submit starts one\n"


def test_a_run_that_is_not_there_is_one_line_with_those_that_are(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    add_run(server, "first", "SUCCEEDED")
    assert main(["status", "--run", "frist"]) == 1
    assert "there is none called 'frist', did you mean 'first'? the latest are: first" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["cancel", "retry", "logs"])
def test_without_a_name_nothing_is_cancelled_or_retried_and_no_log_is_shown(
    server: KfpServer, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make cancel` passes what RUN is, and that may be nothing."""
    add_run(server, "of-somebody-else", "RUNNING")
    assert main([command, "--run", ""]) == 1
    assert "RUN= is needed, the name of a run" in capsys.readouterr().err
    assert [row["state"] for row in server.runs] == ["RUNNING"]


def test_cancel_stops_the_newest_run_of_the_name(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    add_run(server, "x", "FAILED")
    add_run(server, "x", "RUNNING", 5)
    assert main(["cancel", "--run", "x"]) == 0
    assert [row["state"] for row in server.runs] == ["FAILED", "CANCELING"]
    server.runs[1]["state"] = "CANCELED"
    assert main(["cancel", "--run", "x"]) == 0
    assert "is CANCELED already" in capsys.readouterr().out


JOBS = "/apis/kubeflow.org/v1/namespaces/kubeflow/pytorchjobs"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterObjects]:
    with running_cluster({JOBS: []}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        yield cluster


def add_job(cluster: ClusterObjects, name: str, place: str, outcome: str = "") -> None:
    metadata = {"name": name, "uid": f"uid-{name}", "annotations": {"dice-suite/job-uri": f"{place}/job.json"}}
    conditions = [{"type": outcome, "status": "True"}] if outcome else []
    cluster.objects[JOBS].append({"metadata": metadata, "spec": {}, "status": {"conditions": conditions}})


def names_of(cluster: ClusterObjects) -> list[str]:
    return [job["metadata"]["name"] for job in cluster.objects[JOBS]]


def test_cancel_deletes_the_jobs_of_the_run_that_have_not_ended(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    submit("x")
    add_job(cluster, "trains", "s3://bucket/dice/runs/x/iteration-1/train")
    add_job(cluster, "done", "s3://bucket/dice/runs/x/warm-start/train", "Succeeded")
    add_job(cluster, "other-run", "s3://bucket/dice/runs/x2/iteration-1/train")
    add_job(cluster, "other-root", "s3://bucket/elsewhere/runs/x/iteration-1/train")
    assert main(["cancel", "--run", "x"]) == 0
    assert server.runs[0]["state"] == "CANCELING"
    assert names_of(cluster) == ["done", "other-run", "other-root"]
    assert "PyTorchJob kubeflow/trains is deleted" in capsys.readouterr().out


def test_a_job_is_deleted_by_its_uid_as_a_real_api_server_checks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods = PodConfig(image="train:1")
    with ApiServer(tmp_path) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        body = PYTORCH_JOB.body(
            "dice-x", "s3://bucket/dice/runs/x/iteration-1/train/job.json", LaunchConfig(), pods, environment={}
        )
        uid = server.store.create(JOB, "default", body)["metadata"]["uid"]
        jobs = TrainingJobs(KubernetesApi("default"), PYTORCH_JOB)
        assert [job["metadata"]["name"] for job in jobs.unfinished("s3://bucket/dice/runs/x")] == ["dice-x"]
        for wrong_or_right, left in (("another", 1), (uid, 0), (uid, 0)):
            jobs.delete("dice-x", wrong_or_right)
            assert len(jobs.unfinished("s3://bucket/dice/runs/x")) == left


def test_cancel_deletes_what_a_run_that_was_terminated_in_the_ui_has_left(
    server: KfpServer, cluster: ClusterObjects
) -> None:
    submit("x")
    server.runs[0]["state"] = "CANCELED"
    add_job(cluster, "trains", "s3://bucket/dice/runs/x/iteration-1/train")
    assert main(["cancel", "--run", "x"]) == 0
    assert names_of(cluster) == []


def add_recurring_run(server: KfpServer, schedule: str, run_id: str) -> dict[str, Any]:
    parameters = {"root": "s3://bucket/dice", "run": schedule, "launch": {"backend": "pytorchjob"}}
    row = add_run(server, f"Run of {schedule}", "RUNNING")
    row |= {"run_id": run_id, "recurring_run_id": "r", "runtime_config": {"parameters": parameters}}
    return row


@pytest.mark.parametrize("name", ["weekly-3f2a9c1b", "Run of weekly"])
def test_a_recurring_run_is_found_by_its_name_in_s3_as_well_as_by_kfps(
    server: KfpServer, cluster: ClusterObjects, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = add_recurring_run(server, "weekly", "3f2a9c1b-77aa-4000-8000-000000000000")
    for number in range(60):
        add_run(server, f"other-{number}", "RUNNING", second=number)
    other = add_recurring_run(server, "nightly", "4f2a9c1b-77aa-4000-8000-000000000000")
    add_job(cluster, "trains", "s3://bucket/dice/runs/weekly-3f2a9c1b/iteration-1/train")
    assert main(["status", "--run", name]) == 0
    assert main(["cancel", "--run", name]) == 0
    assert (wanted["state"], other["state"]) == ("CANCELING", "RUNNING")
    assert names_of(cluster) == []
    assert f"run {name}: is being stopped; make retry RUN={shlex.quote(name)} continues it" in capsys.readouterr().out


def test_the_runs_of_all_teams_are_not_read_for_a_name_that_no_recurring_run_has(server: KfpServer) -> None:
    for number in range(120):
        add_run(server, f"other-{number}", "RUNNING")
    assert main(["status", "--run", "zephyr-20260105-030000"]) == 1
    # The runs of that name, and a page of the latest for the message.
    assert [path for _, path, _ in server.requests].count("/runs") == 2


@pytest.mark.parametrize("name", ["nightly-3f2a9c1b", "weekly-3f2a9c1c", "3f2a9c1b", "weekly"])
def test_a_name_that_only_resembles_a_recurring_runs_is_not_found(
    server: KfpServer, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add_recurring_run(server, "weekly", "3f2a9c1b-77aa-4000-8000-000000000000")
    assert main(["cancel", "--run", name]) == 1
    error = capsys.readouterr().err
    assert f"there is none called {name!r}" in error and "the latest are: Run of weekly" in error


def test_cancel_without_access_to_the_cluster_says_how_to_stop_the_training(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    submit("x")
    cluster.forbidden.add(JOBS)
    assert main(["cancel", "--run", "x"]) == 0
    assert server.runs[0]["state"] == "CANCELING"
    command = "kubectl --namespace kubeflow delete pytorchjobs --selector dice-suite/run=x"
    assert f"training may go on, to stop it: {command}" in capsys.readouterr().err


def test_cancel_leaves_a_job_that_was_asked_to_go_on(server: KfpServer, cluster: ClusterObjects) -> None:
    assert main(["submit", "--preset", "demo", "--run", "x", "--set", "launch.on_cancel=leave"]) == 0
    add_job(cluster, "trains", "s3://bucket/dice/runs/x/iteration-1/train")
    assert main(["cancel", "--run", "x"]) == 0
    assert names_of(cluster) == ["trains"]


def test_a_run_that_was_started_in_the_ui_without_a_name_is_found_by_its_name_in_s3(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    run = add_run(server, "Run of dice-zephyr (3f2a9)", "RUNNING")
    run["run_id"] = "3f2a9c1b-77aa-4000-8000-000000000000"
    run["runtime_config"] = {"parameters": {"root": "s3://bucket/dice", "run": "", "promote_as": "zephyr"}}
    assert main(["status"]) == 0
    assert "zephyr-3f2a9c1b (Run of dice-zephyr (3f2a9))" in capsys.readouterr().out
    assert main(["status", "--run", "zephyr-3f2a9c1b"]) == 0
    assert "run zephyr-3f2a9c1b (Run of dice-zephyr (3f2a9)): RUNNING" in capsys.readouterr().out
    assert main(["submit", "--preset", "demo", "--run", "zephyr-3f2a9c1b"]) == 1
    assert "run 'zephyr-3f2a9c1b' is RUNNING already" in capsys.readouterr().err

"""`make cancel`: what a stopped run leaves behind, and runs that somebody else has stopped a moment before."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.kfp.api import Connection, KfpApi
from tests.cluster_objects import NAMESPACE, ClusterObjects, running_cluster
from tests.kfp_api import KfpServer, running_kfp_server

pytestmark = pytest.mark.slow

JOBS = "/apis/kubeflow.org/v1/namespaces/kubeflow/pytorchjobs"
PODS = f"{NAMESPACE}/pods"
TRAINER = Path(__file__).parents[2] / "data" / "trainer-2.3.0"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    with running_kfp_server() as server:
        monkeypatch.setenv("KFP_HOST", server.host)
        yield server


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterObjects]:
    with running_cluster({JOBS: [], PODS: []}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        yield cluster


def add_run(server: KfpServer, state: str) -> dict[str, Any]:
    parameters = {"root": "s3://bucket/dice", "run": "x", "launch": {"backend": "pytorchjob"}}
    row = {"run_id": "r1", "display_name": "x", "state": state, "created_at": "2026-01-01T00:00:00Z"}
    server.runs.append(row | {"runtime_config": {"parameters": parameters}})
    return server.runs[-1]


def add_pod(cluster: ClusterObjects, name: str, phase: str, run_id: str = "r1") -> None:
    metadata = {"name": name, "uid": f"uid-{name}", "labels": {"pipeline/runid": run_id}}
    cluster.objects[PODS].append({"metadata": metadata, "status": {"phase": phase}})


def add_job(cluster: ClusterObjects) -> None:
    """Add a job of which no pod has started: it has no condition yet."""
    place = "s3://bucket/dice/runs/x/iteration-1/train/job.json"
    metadata = {"name": "trains", "uid": "uid-trains", "annotations": {"dice-suite/job-uri": place}}
    cluster.objects[JOBS].append({"metadata": metadata, "spec": {}, "status": {}})


def names(cluster: ClusterObjects, path: str) -> list[str]:
    return [item["metadata"]["name"] for item in cluster.objects[path]]


def test_pods_that_never_started_are_deleted_and_all_others_are_left(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    add_run(server, "RUNNING")
    for name, phase in (("unschedulable", "Pending"), ("runs", "Running"), ("done", "Succeeded"), ("bad", "Failed")):
        add_pod(cluster, name, phase)
    add_pod(cluster, "of-another-run", "Pending", "r2")
    assert main(["cancel", "--run", "x"]) == 0
    assert server.runs[0]["state"] == "CANCELING"
    assert names(cluster, PODS) == ["runs", "done", "bad", "of-another-run"]
    assert "pod kubeflow/unschedulable, which had not started, is deleted" in capsys.readouterr().out


def test_a_run_that_was_terminated_in_the_ui_leaves_no_pod_either(server: KfpServer, cluster: ClusterObjects) -> None:
    add_run(server, "FAILED")
    add_pod(cluster, "image-pull", "Pending")
    assert main(["cancel", "--run", "x"]) == 0
    assert names(cluster, PODS) == []


def test_whoever_may_not_delete_pods_gets_the_command(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    add_run(server, "RUNNING")
    add_pod(cluster, "image-pull", "Pending")
    cluster.forbidden.add(f"{PODS}/image-pull")
    assert main(["cancel", "--run", "x"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "to delete them: kubectl --namespace kubeflow delete pods --selector pipeline/runid=r1 "
        "--field-selector status.phase=Pending"
    )


def test_a_run_that_is_canceling_goes_on_to_its_job_and_pods(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody has pressed Terminate in the UI a moment before."""
    add_run(server, "CANCELING")
    add_job(cluster)
    add_pod(cluster, "image-pull", "Pending")
    assert main(["cancel", "--run", "x"]) == 0
    printed = capsys.readouterr()
    assert "run x: is being stopped already" in printed.out and printed.err == ""
    assert names(cluster, JOBS) == names(cluster, PODS) == []


@pytest.mark.parametrize("state", ["CANCELING", "FAILED", "SUCCEEDED"])
def test_stopping_what_can_no_longer_be_stopped_is_no_error(server: KfpServer, state: str) -> None:
    """KFP answers HTTP 400 "Row not found": the state has changed between the list of runs and the call."""
    add_run(server, state)
    assert KfpApi(Connection(server.host)).terminate("r1") is False


def test_what_kfp_answers_does_not_keep_training_from_being_stopped(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as for a run whose workflow is gone."""
    add_run(server, "RUNNING")
    add_job(cluster)
    # Its health twice, the list of runs, the call.
    server.faults = [None, None, None, 500]
    assert main(["cancel", "--run", "x"]) == 1
    assert "HTTP 500" in capsys.readouterr().err
    assert names(cluster, JOBS) == []


def test_the_trainjobs_of_a_run_that_have_not_ended_are_deleted(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/kubeflow/trainjobs"
    add_run(server, "RUNNING")["runtime_config"]["parameters"]["launch"] = {"backend": "trainjob"}
    running, done = (json.loads((TRAINER / f"trainjob-{state}.json").read_text()) for state in ("running", "complete"))
    for job in (running, done):
        job["metadata"]["annotations"] = {"dice-suite/job-uri": "s3://bucket/dice/runs/x/iteration-1/train/job.json"}
    cluster.objects[path] = [running, done]
    assert main(["cancel", "--run", "x"]) == 0
    assert names(cluster, path) == [done["metadata"]["name"]]
    assert f"TrainJob kubeflow/{running['metadata']['name']} is deleted" in capsys.readouterr().out
    cluster.forbidden.add(path)
    assert main(["cancel", "--run", "x"]) == 0
    by_hand = "kubectl --namespace kubeflow delete trainjobs --selector dice-suite/run=x"
    assert f"training may go on, to stop it: {by_hand}" in capsys.readouterr().err


@pytest.mark.parametrize("launch", [{"backend": "trainjob"}, None], ids=["another backend", "default"])
def test_a_job_of_a_kind_that_the_run_does_not_name_is_deleted_too(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str], launch: dict[str, str] | None
) -> None:
    """The run was continued with another backend, or KFP has left out what is the pipeline's default."""
    parameters = add_run(server, "RUNNING")["runtime_config"]["parameters"]
    del parameters["launch"]
    parameters |= {"launch": launch} if launch else {}
    add_job(cluster)
    assert main(["cancel", "--run", "x"]) == 0
    assert names(cluster, JOBS) == [] and "PyTorchJob kubeflow/trains is deleted" in capsys.readouterr().out


def test_a_kind_that_the_run_does_not_name_and_one_may_not_look_at_is_no_fault(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    add_run(server, "RUNNING")
    add_job(cluster)
    cluster.forbidden.add("/apis/trainer.kubeflow.org/v1alpha1/namespaces/kubeflow/trainjobs")
    assert main(["cancel", "--run", "x"]) == 0
    assert names(cluster, JOBS) == [] and capsys.readouterr().err == ""

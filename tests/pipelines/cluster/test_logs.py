"""`make logs`: the logs of a run's pods; there and in `make status`, why a pod does not run yet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from tests.cluster_objects import NAMESPACE, ClusterObjects, running_cluster
from tests.kfp_api import KfpServer, running_kfp_server


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    with running_kfp_server() as server:
        monkeypatch.setenv("KFP_HOST", server.host)
        yield server


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterObjects]:
    with running_cluster({}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        yield cluster


def pod(name: str, stage: str, time: str, status: Any) -> dict[str, Any]:
    labels = {"pipeline/runid": "r1", **({"app.kubernetes.io/component": stage} if stage else {})}
    return {"metadata": {"name": name, "labels": labels, "creationTimestamp": time}, "status": status}


def test_logs_are_those_of_the_runs_stages_oldest_first(
    cluster: ClusterObjects, kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    pulling = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}
    cluster.objects[f"{NAMESPACE}/pods"] = [
        pod("b", "train", "2026-01-01T00:00:05Z", {"phase": "Running"}),
        pod("a", "pair", "2026-01-01T00:00:01Z", {"phase": "Succeeded"}),
        pod("c", "evaluate", "2026-01-01T00:00:09Z", pulling),
        pod("driver", "", "2026-01-01T00:00:00Z", {}),
    ]
    cluster.objects |= {f"{NAMESPACE}/pods/a/log": "one\ntwo\n", f"{NAMESPACE}/pods/b/log": "step 1\n"}
    cluster.forbidden.add(f"{NAMESPACE}/pods/c/log")
    kfp.runs = [{"run_id": "r1", "display_name": "x", "state": "RUNNING", "created_at": "2026-01-01T00:00:00Z"}]
    assert main(["logs", "--run", "x"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "== pair: a (Succeeded)",
        "[pair] one",
        "[pair] two",
        "== train: b (Running)",
        "[train] step 1",
        "== evaluate: c (Pending)",
    ]
    assert "no log: ErrImagePull" in printed.err
    assert main(["logs", "--run", "x", "--task", "train"]) == 0
    assert "pair" not in capsys.readouterr().out
    assert main(["logs", "--run", "x", "--task", "score"]) == 1
    assert "no pod of stage 'score' is left" in capsys.readouterr().err


RUN = {"run_id": "r1", "display_name": "x", "state": "RUNNING", "created_at": "2026-01-01T00:00:00Z"}
NO_NODE = {
    "phase": "Pending",
    "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}],
}
NO_LAUNCHER = {
    "phase": "Pending",
    "initContainerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "launcher"}}}],
    "containerStatuses": [{"state": {"waiting": {"reason": "PodInitializing"}}}],
}


def test_the_status_of_a_run_says_why_pods_wait_kfps_own_among_them(
    cluster: ClusterObjects, kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.objects[f"{NAMESPACE}/pods"] = [
        pod("b", "generate", "2026-01-01T00:00:05Z", NO_LAUNCHER),
        pod("driver", "", "2026-01-01T00:00:01Z", NO_NODE),
        pod("c", "train", "2026-01-01T00:00:07Z", {"phase": "Running"}),
    ]
    kfp.runs = [RUN]
    assert main(["status", "--run", "x"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  driver does not run yet: 0/3 nodes are available",
        "  generate does not run yet: ImagePullBackOff: launcher",
    ]


def test_the_status_of_a_run_needs_no_kubernetes_api(
    cluster: ClusterObjects, kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.forbidden.add(f"{NAMESPACE}/pods")
    kfp.runs = [RUN]
    assert main(["status", "--run", "x"]) == 0
    assert "why tasks wait is not shown" in capsys.readouterr().err
    kfp.runs = [{**RUN, "state": "SUCCEEDED"}]
    assert main(["status", "--run", "x"]) == 0
    assert capsys.readouterr().err == ""

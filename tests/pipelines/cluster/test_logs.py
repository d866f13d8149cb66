"""`make logs`: the logs of a run's pods; there and in `make status`, why a pod does not run yet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from tests.cluster_objects import NAMESPACE, ClusterObjects, running_cluster
from tests.kfp_api import KfpServer, running_kfp_server

RECURRING = Path(__file__).parents[2] / "data" / "kfp-2.17.0" / "run-recurring-succeeded.json"


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


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_the_logs_of_a_stage_are_those_of_each_task_that_runs_it(
    stage: str, cluster: ClusterObjects, kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pipelines of older versions have a task for each of the two."""
    names = ("generate-and-score", "generate", "score", "pair")
    cluster.objects[f"{NAMESPACE}/pods"] = [
        pod(name, name, f"2026-01-01T00:00:0{second}Z", {"phase": "Running"}) for second, name in enumerate(names)
    ]
    cluster.objects |= {f"{NAMESPACE}/pods/{name}/log": "one\n" for name in names}
    kfp.runs = [RUN]
    assert main(["logs", "--run", "x", "--task", stage]) == 0
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("== ")]
    assert shown == ["generate-and-score:", f"{stage}:"]


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


def test_tail_counts_the_lines_that_are_shown_and_raw_shows_all(
    cluster: ClusterObjects, kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.objects[f"{NAMESPACE}/pods"] = [pod("a", "pair", "2026-01-01T00:00:01Z", {"phase": "Succeeded"})]
    exited = 'time="2026-11-28T23:12:47.490Z" level=info msg="sub-process exited" argo=true error="<nil>"'
    cluster.objects[f"{NAMESPACE}/pods/a/log"] = "\n".join(["one", "two", "three", exited])
    kfp.runs = [RUN]
    assert main(["logs", "--run", "x", "--tail", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["[pair] two", "[pair] three"]
    assert main(["logs", "--run", "x", "--tail", "2", "--raw"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["[pair] three", f"[pair] {exited}"]
    assert main(["logs", "--run", "x", "--tail", "0", "--raw"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_recurring_run_is_shown_by_our_name_and_kfps(
    cluster: ClusterObjects, kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = json.loads(RECURRING.read_text())
    kfp.runs = [recorded]
    cluster.objects[f"{NAMESPACE}/pods"] = [pod("a", "pair", "2026-01-01T00:00:01Z", {"phase": "Succeeded"})]
    cluster.objects[f"{NAMESPACE}/pods"][0]["metadata"]["labels"]["pipeline/runid"] = recorded["run_id"]
    cluster.objects[f"{NAMESPACE}/pods/a/log"] = "one\n"
    for name in ("soon-4ac25117", "soonj7fkn-1-1032575986"):
        assert main(["logs", "--run", name]) == 0
        assert capsys.readouterr().out.splitlines()[0] == "run soon-4ac25117 (soonj7fkn-1-1032575986)"


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", ""], "run: RUN= is needed, the name of a run; make status lists them"),
        (["--run", "x", "--task", "trian"], "task: unknown stage 'trian', did you mean 'train'?"),
    ],
)
def test_what_is_wrong_with_the_command_is_told_without_a_server(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_HOST", "http://127.0.0.1:9")
    assert main(["logs", *words]) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1

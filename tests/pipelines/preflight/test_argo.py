"""What preflight says of Argo's defaults: those of a stock KFP 2.17.0, those that make kind-up sets, and others."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dice_core.launch.kubernetes import KubernetesApi
from pipelines.preflight.argo import CONFIG_MAP, check_retries, check_ttl, parse_defaults
from pipelines.preflight.findings import Line, checked
from tests.cluster_objects import ClusterObjects, running_cluster

PROJECT = Path(__file__).parents[3]
STOCK_FILE = PROJECT / "tests" / "data" / "kfp-2.17.0" / "workflow-controller-configmap.yaml"
STOCK = yaml.safe_load(STOCK_FILE.read_text())["data"]
PATCH = PROJECT / "manifests" / "kubeflow-pipelines" / "workflow-defaults.yaml"
PLACE = f"/api/v1/namespaces/kubeflow/configmaps/{CONFIG_MAP}"
AGENT = "/apis/apps/v1/namespaces/kubeflow/deployments/ml-pipeline-persistenceagent"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterObjects]:
    with running_cluster({PLACE: {"data": STOCK}}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        yield cluster


@pytest.fixture(scope="module")
def patched() -> Any:
    """Return the stock ConfigMap after the command of the documents, by kubectl itself."""
    command = ["kubectl", "patch", "--local", "--filename", str(STOCK_FILE), "--patch-file", str(PATCH), "-o", "yaml"]
    return yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def with_spec(spec: Any) -> dict[str, Any]:
    return {"data": {"workflowDefaults": yaml.safe_dump({"spec": spec})}}


def with_agent(seconds: str) -> dict[str, Any]:
    env = [{"name": "NAMESPACE", "valueFrom": {}}, {"name": "TTL_SECONDS_AFTER_WORKFLOW_FINISH", "value": seconds}]
    return {"spec": {"template": {"spec": {"containers": [{"env": env}]}}}}


def retries(namespace: str = "kubeflow") -> Line:
    return checked("retries", lambda: check_retries(KubernetesApi(namespace), 2))


def ttl() -> Line:
    return checked("finished runs", lambda: check_ttl(KubernetesApi("kubeflow")))


def test_on_a_stock_kfp_no_failed_task_is_tried_again_and_preflight_fails(cluster: ClusterObjects) -> None:
    line = retries()
    assert line.state == "FAIL"
    assert line.text.startswith(
        "ConfigMap workflow-controller-configmap in namespace kubeflow has retryPolicy OnError:"
    )
    assert "manifests/README.md has the commands" in line.text and "SET=num_retries=0" in line.text


def test_on_a_stock_kfp_a_finished_run_is_gone_after_an_hour(cluster: ClusterObjects) -> None:
    line = ttl()
    assert line.state == "?" and line.text.startswith(
        "a finished run stays 1h, then its workflow, its pods (make logs)"
    )


def test_the_patch_of_the_manifests_makes_both_right(cluster: ClusterObjects, patched: Any) -> None:
    cluster.objects |= {PLACE: patched, AGENT: with_agent("604800")}
    assert retries() == Line("ok", "retries", "a task that fails is tried again, 2 times at most (retryPolicy Always)")
    assert ttl().state == "ok" and "stays 7d" in ttl().text


def test_the_patch_says_all_that_the_stock_defaults_say_and_changes_nothing_else(patched: Any) -> None:
    """A patch replaces the text of a key as a whole."""
    before, after = parse_defaults(STOCK), parse_defaults(patched["data"])
    assert (sorted(after), sorted(after["ttlStrategy"])) == (sorted(before), sorted(before["ttlStrategy"]))
    assert patched["data"] | {"workflowDefaults": STOCK["workflowDefaults"]} == STOCK


def test_the_persistence_agent_of_kfp_ends_a_finished_run_too(cluster: ClusterObjects, patched: Any) -> None:
    cluster.objects |= {PLACE: patched, AGENT: with_agent("7200")}
    assert ttl().state == "?" and "stays 2h" in ttl().text
    cluster.forbidden.add(AGENT)
    assert ttl().state == "ok" and "stays 7d" in ttl().text


@pytest.mark.parametrize(
    ("strategy", "state", "text"),
    [
        ({"limit": "0", "retryPolicy": "Always"}, "ok", "retryPolicy Always"),
        ({"limit": 0, "retryPolicy": "OnFailure"}, "ok", "retryPolicy OnFailure"),
        ({}, "ok", "retryPolicy OnFailure"),
        ({"limit": "2", "retryPolicy": "OnError"}, "FAIL", "has retryPolicy OnError"),
        ({"limit": "0", "retryPolicy": "OnTransientError"}, "FAIL", "has retryPolicy OnTransientError"),
        ({"limit": "2", "retryPolicy": "Always"}, "?", "the frames around each task are tried again too"),
        ({"limit": "0", "expression": "lastRetry.exitCode != '2'"}, "?", "lastRetry.exitCode != '2'"),
    ],
)
def test_the_policy_decides(cluster: ClusterObjects, strategy: dict[str, Any], state: str, text: str) -> None:
    cluster.objects[PLACE] = with_spec({"templateDefaults": {"retryStrategy": strategy}})
    assert retries().state == state and text in retries().text


def test_defaults_are_read_from_one_key_with_the_whole_configuration_too(cluster: ClusterObjects) -> None:
    cluster.objects[PLACE] = {"data": {"config": yaml.safe_dump({"workflowDefaults": {"spec": parse_defaults(STOCK)}})}}
    assert (retries().state, ttl().state) == ("FAIL", "?")


def test_a_config_map_without_defaults_keeps_runs_and_makes_retries(cluster: ClusterObjects) -> None:
    cluster.objects[PLACE] = {"data": {}}
    assert (retries().state, ttl().state) == ("ok", "ok")
    cluster.objects[PLACE] = {}
    assert (retries().state, ttl().state) == ("ok", "ok")


@pytest.mark.parametrize("text", ["spec: [", "a line", "spec: 5"])
def test_defaults_that_cannot_be_read_are_one_line(cluster: ClusterObjects, text: str) -> None:
    cluster.objects[PLACE] = {"data": {"workflowDefaults": text}}
    assert retries().state == "FAIL" and "workflowDefaults cannot be read" in retries().text
    assert len(retries().text.splitlines()) == 1


def test_a_profile_finds_the_config_map_of_its_kubeflow(cluster: ClusterObjects) -> None:
    assert retries("team-a").state == "FAIL"
    cluster.objects.pop(PLACE)
    assert retries("team-a").state == "?" and "in namespace team-a or kubeflow" in retries("team-a").text


def test_whoever_may_not_look_is_told_so(cluster: ClusterObjects) -> None:
    cluster.forbidden.add(PLACE)
    assert (retries().state, ttl().state) == ("?", "?")

"""Whether Kueue's queue that training is put into is there and admits jobs."""

from pathlib import Path
from typing import Any

import pytest

from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from pipelines.preflight.queues import check_queue
from tests.cluster_objects import running_cluster

pytestmark = pytest.mark.slow

KUEUE = "/apis/kueue.x-k8s.io"
VERSIONS = {"preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2", "version": "v1beta2"}}


def queues(*conditions: dict[str, str]) -> dict[str, Any]:
    path = f"{KUEUE}/v1beta2/namespaces/kubeflow/localqueues"
    queue = {"metadata": {"name": "dice"}, "spec": {"clusterQueue": "pool"}, "status": {"conditions": list(conditions)}}
    return {KUEUE: VERSIONS, path: [queue], f"{path}/dice": queue}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(objects: dict[str, Any], name: str = "dice") -> str:
        with running_cluster(objects) as cluster:
            monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
            return check_queue(KubernetesApi("kubeflow"), name)

    return run


def test_a_queue_that_is_active_is_found(check: Any) -> None:
    assert check(queues({"type": "Active", "status": "True"})) == "LocalQueue dice is active, of ClusterQueue pool"


def test_a_misspelled_queue_is_told_with_those_that_are_there(check: Any) -> None:
    with pytest.raises(
        KubernetesError, match=r"no LocalQueue dcie in namespace kubeflow, .* only wait; there are: dice"
    ):
        check(queues(), "dcie")


def test_without_kueue_a_queue_is_told_to_be_impossible(check: Any) -> None:
    with pytest.raises(KubernetesError, match=r"the API knows no Kueue, .*: install it .*or SET=cluster.queue_name="):
        check({})


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (
            [{"type": "Active", "status": "False", "message": "Can't submit new workloads to clusterQueue"}],
            "Can't submit",
        ),
        ([], "its state is not known"),
    ],
)
def test_a_queue_that_admits_nothing_is_told(check: Any, conditions: list[dict[str, str]], message: str) -> None:
    with pytest.raises(KubernetesError, match=f"LocalQueue dice admits no job .*{message}.*clusterqueue pool"):
        check(queues(*conditions))

"""Which nodes preflight says can take the pods of a run."""

from pathlib import Path
from typing import Any

import pytest

from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.launch.settings import LaunchConfig
from pipelines.cluster.config import ClusterConfig
from pipelines.cluster.pools import POOLS
from pipelines.preflight.findings import UncertainError
from pipelines.preflight.nodes import Pods, check_disk, check_driver, check_nodes, cpu_task_pods, training_pods
from tests.cluster_objects import running_cluster

pytestmark = pytest.mark.slow

GPU_LABELS, GPU_TAINT = POOLS["p4d"]().gpu_node_selector, {"key": "nvidia.com/gpu", "effect": "NoSchedule"}


def node(name: str, memory: str, *taints: dict[str, str], gpus: str = "", labels: Any = None) -> dict[str, Any]:
    offered = {"cpu": "95", "memory": memory, **({"nvidia.com/gpu": gpus} if gpus else {})}
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"taints": list(taints)},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": offered},
    }


def gpu_node(name: str) -> dict[str, Any]:
    return node(name, "1150Gi", GPU_TAINT, gpus="8", labels=GPU_LABELS)


CPU_TASKS = cpu_task_pods(POOLS["p4d"]())


def training(config: ClusterConfig | None = None, num_nodes: int = 1) -> Pods:
    return training_pods(
        config or POOLS["p4d"](), LaunchConfig(backend="pytorchjob", num_nodes=num_nodes, processes_per_node=8)
    )


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(pods: Pods, *nodes: dict[str, Any]) -> str:
        with running_cluster({"/api/v1/nodes": list(nodes)}) as cluster:
            monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
            return check_nodes(KubernetesApi("kubeflow"), pods)

    return run


def test_training_and_cpu_tasks_each_have_nodes_of_their_own(check: Any) -> None:
    nodes = gpu_node("gpu-1"), node("cpu-1", "60Gi")
    assert check(training(), *nodes) == "1 of 1 can take a training pod (80 cpu, 400Gi memory, 8 nvidia.com/gpu)"
    assert check(CPU_TASKS, *nodes) == "1 of 2 can take the largest CPU task (2 cpu, 32Gi memory)"


def test_a_tainted_gpu_node_alone_leaves_cpu_tasks_without_a_place(check: Any) -> None:
    with pytest.raises(
        KubernetesError, match=r"gpu-1 has the taint .*, which cluster.cpu_tolerations does not tolerate"
    ):
        check(CPU_TASKS, gpu_node("gpu-1"))


def test_a_node_must_hold_the_largest_cpu_task_which_imports_a_model(check: Any) -> None:
    with pytest.raises(KubernetesError, match=r"cpu-1 offers 14Gi memory, 32Gi are needed\. .*cluster\.import_memory"):
        check(CPU_TASKS, node("cpu-1", "14Gi"))


@pytest.mark.parametrize(
    ("pods", "nodes", "message"),
    [
        (training(), [node("cpu-1", "60Gi")], "0 with the labels node.kubernetes.io/instance-type=p4d.24xlarge can"),
        (training(POOLS["p4d"]().model_copy(update={"gpu_node_selector": {}})), [node("cpu-1", "60Gi")], "0 can take"),
        (training(num_nodes=2), [gpu_node("gpu-1")], "2 are needed"),
        (CPU_TASKS, [], r"an autoscaler makes more \(from zero too\); otherwise start them, or SET='cluster.cpu_node_"),
    ],
)
def test_nodes_that_are_not_there_now_may_come(
    check: Any, pods: Pods, nodes: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UncertainError, match=message):
        check(pods, *nodes)


def test_a_node_without_its_device_plugin_is_no_question_of_waiting(check: Any) -> None:
    with pytest.raises(KubernetesError, match=r"gpu-1 offers no nvidia.com/gpu, 8 are needed"):
        check(training(), node("gpu-1", "1150Gi", GPU_TAINT, labels=GPU_LABELS))


def test_without_labels_the_nodes_with_gpus_alone_tell_disk_and_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU node's small disk, and the label it has kept from a GPU that is gone, are of no matter."""
    gpu, cpu = node("gpu-1", "1150Gi", gpus="8"), node("cpu-1", "60Gi")
    for one, disk, driver in ((gpu, "200Gi", "580"), (cpu, "20Gi", "470")):
        one["status"]["allocatable"]["ephemeral-storage"] = disk
        one["metadata"]["labels"] = {"nvidia.com/cuda.driver-version.major": driver}
    with running_cluster({"/api/v1/nodes": [gpu, cpu]}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        api, anywhere = KubernetesApi("kubeflow"), ClusterConfig()
        assert check_disk(api, anywhere).startswith("the smallest offers 215 GB")
        assert check_driver(api, anywhere) == "580 on 1 nodes, 580 is needed"

"""Whether Kueue's queue that training is put into is there and admits jobs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dice_core.launch.job_kinds import JOB_KINDS
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.launch.settings import LaunchConfig
from pipelines.cluster.pools import POOLS
from pipelines.preflight.queues import check_queue, queue_lines
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


CONFIG = "/api/v1/namespaces/kueue-system/configmaps/kueue-manager-config"
# As Kueue's releases have them: up to v0.18, and from v0.19 on without those of the training operator.
BEFORE = ["batch/job", "jobset.x-k8s.io/jobset", "trainer.kubeflow.org/trainjob", "kubeflow.org/pytorchjob"]
SINCE_V0_19 = BEFORE[:-1]
ALL = ("cpu", "memory", "nvidia.com/gpu", "ephemeral-storage")
MANAGED, RELEASE = "what Kueue manages", "Kueue's release"
CONTROLLER = "/apis/apps/v1/namespaces/kueue-system/deployments/kueue-controller-manager"


def kueue(frameworks: list[str], covered: Sequence[str] = ALL) -> dict[str, Any]:
    """Return a Kueue with an active queue, which manages some kinds of jobs and covers some resources."""
    config = {"apiVersion": "config.kueue.x-k8s.io/v1beta2", "integrations": {"frameworks": frameworks}}
    return queues({"type": "Active", "status": "True"}) | {
        CONFIG: {"data": {"controller_manager_config.yaml": yaml.safe_dump(config)}},
        f"{KUEUE}/v1beta2/clusterqueues/pool": {"spec": {"resourceGroups": [{"coveredResources": list(covered)}]}},
    }


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(objects: dict[str, Any], backend: str, forbidden: str = "", **settings: Any) -> dict[str, str]:
        """Return what is told after `queue`, by what it is about."""
        config = POOLS["p4d"]().model_copy(update={"queue_name": "dice", **settings})
        launch = LaunchConfig.parse({"backend": backend, "processes_per_node": 8}, "launch")
        with running_cluster(objects) as cluster:
            cluster.forbidden |= {forbidden} if forbidden else set()
            monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
            told = queue_lines(KubernetesApi("kubeflow"), config, launch, JOB_KINDS.get(backend))
            return {line.what: f"{line.state} {line.text}" for line in told if line.what != "queue"}

    return run


def test_kueue_manages_both_kinds_up_to_v0_18_and_trainjobs_alone_from_v0_19_on(lines: Any) -> None:
    for backend, frameworks in (("pytorchjob", BEFORE), ("trainjob", BEFORE), ("trainjob", SINCE_V0_19)):
        told = lines(kueue(frameworks), backend)[MANAGED]
        assert told.startswith(f"ok {JOB_KINDS[backend].name}s, by integrations.frameworks of ConfigMap kueue-system/")
        assert told.endswith("tasks with GPUs start without waiting: pod is not in it")
    told = lines(kueue(SINCE_V0_19), "pytorchjob")[MANAGED]
    assert told.startswith("FAIL Kueue does not manage PyTorchJobs here, so that training would only wait: add")
    assert "from v0.19 on, PyTorchJobs are not among its defaults" in told


def test_kueue_that_manages_pods_lets_tasks_with_gpus_wait_too(lines: Any) -> None:
    place = "by integrations.frameworks of ConfigMap kueue-system/kueue-manager-config"
    assert lines(kueue([*BEFORE, "pod"]), "trainjob")[MANAGED] == f"ok TrainJobs and pods, {place}"
    assert lines(kueue(["pod"]), "torchrun") == {MANAGED: f"ok pods, {place}"}


@pytest.mark.parametrize(
    ("change", "forbidden", "told"),
    [
        (lambda objects: objects.pop(CONFIG), "", "? no ConfigMap kueue-manager-config with controller_manager_config"),
        (lambda objects: objects[CONFIG]["data"].update({"controller_manager_config.yaml": "- a"}), "", "? "),
        (lambda _: None, CONFIG, "? you may not look: "),
    ],
)
def test_what_kueue_manages_is_not_known_where_its_configuration_cannot_be_read(
    lines: Any, change: Any, forbidden: str, told: str
) -> None:
    objects = kueue(BEFORE)
    change(objects)
    assert lines(objects, "trainjob", forbidden)[MANAGED].startswith(told)


def test_a_resource_that_the_queue_does_not_cover_is_told(lines: Any) -> None:
    about = "queue's resources"
    assert lines(kueue(BEFORE), "trainjob")[about].startswith("ok ClusterQueue pool covers what")
    for missing in ("ephemeral-storage", "nvidia.com/gpu"):
        told = lines(kueue(BEFORE, [name for name in ALL if name != missing]), "pytorchjob")[about]
        assert told.startswith(f"FAIL ClusterQueue pool does not cover {missing}, which training pods request")
    told = lines(kueue(BEFORE), "trainjob", trainer_extra_resources={"vpc.amazonaws.com/efa": "4"})[about]
    assert "does not cover vpc.amazonaws.com/efa" in told
    assert lines(kueue(BEFORE), "trainjob", f"{KUEUE}/v1beta2/clusterqueues/pool")[about].startswith("? ")


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("registry.k8s.io/kueue/kueue:v0.20.0", "ok v0.20.0, with TrainJobs of Trainer 2.3"),
        ("registry.k8s.io/kueue/kueue:v0.19.4", "ok v0.19.4"),
        ("registry.k8s.io/kueue/kueue:v0.18.10@sha256:00", "ok v0.18.10"),
        ("registry.k8s.io/kueue/kueue:v1.0.0", "ok v1.0.0"),
        ("registry.k8s.io/kueue/kueue:v0.19.3", "FAIL v0.19.3 changes TrainJobs of Trainer 2.3 when it admits them"),
        ("registry.k8s.io/kueue/kueue:v0.18.7", "FAIL v0.18.7 changes"),
        ("registry.k8s.io/kueue/kueue:v0.17.9", "FAIL v0.17.9 changes"),
        ("registry.example.com/kueue@sha256:00", "? the image of Kueue's controller does not tell: TrainJobs need"),
    ],
)
def test_a_release_of_kueue_that_changes_trainjobs_is_told(lines: Any, image: str, told: str) -> None:
    spec = {"template": {"spec": {"containers": [{"image": image}]}}}
    objects = kueue(SINCE_V0_19) | {CONTROLLER: {"spec": spec}}
    assert lines(objects, "trainjob")[RELEASE].startswith(told)
    assert RELEASE not in lines(objects, "pytorchjob")


def test_a_release_of_kueue_that_cannot_be_looked_at_is_not_known(lines: Any) -> None:
    assert lines(kueue(SINCE_V0_19), "trainjob")[RELEASE].startswith("? the image of Kueue's controller does not tell")
    assert lines(kueue(SINCE_V0_19), "trainjob", CONTROLLER)[RELEASE].startswith("? you may not look: ")

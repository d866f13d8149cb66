"""`make preflight`: what is told of a cluster that has everything, that lacks something, of none."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import images
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.storage.address import open_storage
from pipelines.cli import main
from pipelines.preflight.nodes import check_images
from tests.cluster_objects import NAMESPACE, REVIEWS, ClusterObjects, running_cluster
from tests.kfp_api import KfpServer, running_kfp_server
from tests.pipelines.preflight.test_training import EVERYTHING as TRAINER
from tests.rendered import find, render

pytestmark = pytest.mark.slow

NODE = {
    "metadata": {
        "name": "gpu-1",
        "labels": {"node.kubernetes.io/instance-type": "p4d.24xlarge", "nvidia.com/cuda.driver-version.major": "580"},
    },
    "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
    "status": {
        "conditions": [{"type": "Ready", "status": "True"}],
        "images": [{"names": [f"docker.io/{name}"]} for name in (images.CORE, images.GENERATE, images.TRAIN)],
        "allocatable": {
            "cpu": "95690m",
            "memory": "1150Gi",
            "nvidia.com/gpu": "8",
            "ephemeral-storage": "209715200Ki",
        },
    },
}
CPU_NODE = {
    "metadata": {"name": "cpu-1"},
    "spec": {},
    "status": {
        "conditions": [{"type": "Ready", "status": "True"}],
        "allocatable": {"cpu": "7910m", "memory": "60Gi"},
    },
}
DEFAULTS = Path(__file__).parents[3] / "manifests" / "kubeflow-pipelines" / "workflow-defaults.yaml"
ARGO = f"{NAMESPACE}/configmaps/workflow-controller-configmap"
ACCOUNT = {"metadata": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/dice"}}}
POLICIES = "/apis/networking.k8s.io/v1/namespaces/kubeflow/networkpolicies"
CLAIM = f"{NAMESPACE}/persistentvolumeclaims/dice-model-cache"


def everything(root: str) -> dict[str, Any]:
    """Return what a cluster with overlay a100 has."""
    quota = {"metadata": {"name": "dice-gpus"}, "spec": {"hard": {"requests.nvidia.com/gpu": "8"}}}
    return {
        "/version": {"gitVersion": "v1.31.0"},
        "/apis/kubeflow.org/v1": {"resources": [{"name": "pytorchjobs"}, {"name": "pytorchjobs/status"}]},
        f"{NAMESPACE}/serviceaccounts/dice-pipeline": copy.deepcopy(ACCOUNT),
        f"{NAMESPACE}/serviceaccounts/dice-trainer": copy.deepcopy(ACCOUNT),
        POLICIES: [],
        f"{NAMESPACE}/configmaps/dice-config": {
            "data": {"AWS_ENDPOINT_URL": "", "AWS_REGION": "us-east-1", "DICE_ROOT": root}
        },
        ARGO: yaml.safe_load(DEFAULTS.read_text()),
        CLAIM: {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}},
        f"{NAMESPACE}/resourcequotas": [quota],
        "/api/v1/nodes": [copy.deepcopy(NODE), copy.deepcopy(CPU_NODE)],
    }


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    with running_kfp_server() as server:
        monkeypatch.setenv("KFP_HOST", server.host)
        monkeypatch.delenv("DICE_ROOT", raising=False)
        yield server


@pytest.fixture
def cluster(s3: str, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterObjects]:
    with running_cluster(everything(s3)) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        yield cluster


def preflight(capsys: pytest.CaptureFixture[str], *settings: str, preset: str = "zephyr") -> tuple[int, list[str]]:
    code = main(["preflight", "--preset", preset, *(["--set", *settings] if settings else [])])
    return code, capsys.readouterr().out.splitlines()


def test_a_cluster_that_has_everything_is_ok_line_by_line(
    cluster: ClusterObjects, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = preflight(capsys)
    assert code == 0
    assert {line.split()[0] for line in lines} == {"ok"}
    names = [line.removeprefix("ok").partition(":")[0].strip() for line in lines]
    assert names == [
        "settings",
        "GPU memory",
        "Kubeflow Pipelines",
        "Kubernetes",
        "service account dice-pipeline",
        "service account dice-trainer",
        "config map dice-config",
        "rights on S3",
        "model cache",
        "training operator",
        "retries",
        "finished runs",
        "rights of dice-pipeline",
        "your rights",
        "images",
        "shared memory",
        "nodes for training",
        "nodes for CPU tasks",
        "disks for training",
        "GPU driver",
        "quota",
        "root",
        "S3, from this machine",
    ]
    assert open_storage(f"{s3}/preflight").list() == [], "nothing is left behind"


def test_a_cluster_with_trainer_in_place_of_the_operator_is_ok_for_trainjobs(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    del cluster.objects["/apis/kubeflow.org/v1"]
    cluster.objects |= copy.deepcopy(TRAINER)
    code, lines = preflight(capsys, "launch.backend=trainjob")
    assert code == 0 and {line.split()[0] for line in lines} == {"ok"}
    assert "ok    Kubeflow Trainer: TrainJob trainer.kubeflow.org/v1alpha1" in lines
    assert "ok    rights of dice-pipeline: may report outcomes, create, follow and delete TrainJobs" in lines


def without(path: str) -> Any:
    return lambda cluster: cluster.objects.pop(path)


def without_results(cluster: ClusterObjects) -> None:
    cluster.role_rules = [rule for rule in cluster.role_rules if "workflowtaskresults" not in rule["resources"]]


def node(change: Any) -> Any:
    return lambda cluster: change(cluster.objects["/api/v1/nodes"][0])


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (without(f"{NAMESPACE}/serviceaccounts/dice-trainer"), [], "service account dice-trainer: there is none in"),
        (without("/apis/kubeflow.org/v1"), [], "training operator: the API knows no PyTorchJob: install"),
        (lambda c: c.objects[ARGO]["data"].update(workflowDefaults="spec: {templateDefaults: {retryStrategy: "
                                                                  "{limit: '2', retryPolicy: OnError}}}"),
         [], "retries: ConfigMap workflow-controller-configmap in namespace kubeflow has retryPolicy OnError"),
        (lambda c: c.role_rules.pop(0), [], "may not create pytorchjobs, get pytorchjobs"),
        (without_results, [], "may not create workflowtaskresults, patch workflowtaskresults: make deploy"),
        (without_results, ["launch.backend=torchrun"], "may not create workflowtaskresults"),
        (without(CLAIM), [], "model cache: no claim dice-model-cache"),
        (lambda c: c.objects[CLAIM].update(status={"phase": "Pending"}, spec={"storageClassName": "efs"}), [],
         "waits for the storage class efs"),
        (lambda c: c.objects[f"{NAMESPACE}/configmaps/dice-config"]["data"].pop("AWS_REGION"), [], "no key AWS_REGION"),
        (lambda _: None, ["cluster.credentials_secret=dice-s3"], "secret dice-s3: there is none in namespace kubeflow"),
        (lambda c: c.objects.update({f"{NAMESPACE}/secrets/hub": {"data": {"TOKEN": ""}}}),
         ["cluster.env_secret=hub"], "secret hub: has no key HF_TOKEN"),
        (lambda _: None, ["cluster.tracking_secret=mlflow"], "secret mlflow: there is none in namespace kubeflow"),
        (lambda _: None, ['cluster.image_pull_secrets=["r"]'], "image pull secret r: there is none"),
        (node(lambda n: n["spec"].update(unschedulable=True)), [], "gpu-1 is cordoned"),
        (node(lambda n: n["status"]["conditions"].clear()), [], "gpu-1 is not ready"),
        (node(lambda n: n["spec"]["taints"][0].update(key="team")), [], "gpu-1 has the taint team:NoSchedule"),
        (node(lambda n: n["status"]["allocatable"].pop("nvidia.com/gpu")), [], "offers no nvidia.com/gpu, 8 are"),
        (node(lambda n: n["status"]["allocatable"].update(memory="300Gi")), [], "offers 300Gi memory, 400Gi are"),
        (node(lambda n: n["metadata"]["labels"].update({"nvidia.com/cuda.driver-version.major": "570"})), [],
         "GPU driver: gpu-1 has 570: the images' CUDA 13 needs 580 or newer"),
        (lambda c: c.objects["/api/v1/nodes"].pop(), [], "nodes for CPU tasks: none of 1 can take the"),
        (lambda _: None, ["cluster.queue_name=dcie"], "queue: cluster.queue_name is 'dcie' and the API knows no Kueue"),
        (node(lambda n: n["status"]["images"].pop(1)), [], f"images: {images.GENERATE}: on no node"),
        (lambda _: None, ["cluster.trainer_shm_size=300Gi"], "/dev/shm of a training pod is 300Gi of its 400Gi"),
        (lambda _: None, ["cluster.trainer_shm_size="], "NCCL needs more: SET=cluster"),
        (lambda c: c.objects[f"{NAMESPACE}/resourcequotas"][0]["spec"]["hard"].update({"requests.nvidia.com/gpu": "0"}),
         [], "quota: dice-gpus allows 0 nvidia.com/gpu, training holds 8"),
        (lambda c: c.objects[f"{NAMESPACE}/resourcequotas"][0]["spec"]["hard"].update({"requests.nvidia.com/gpu": "4"}),
         ["launch.processes_per_node=4", "judging.tensor_parallel_size=8"], "allows 4 nvidia.com/gpu, a task holds 8"),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_line_with_what_to_do(
    cluster: ClusterObjects, damage: Any, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(cluster)
    code, lines = preflight(capsys, *settings)
    failed = [line for line in lines if line.startswith("FAIL")]
    assert code == 1 and any(message in line for line in failed), lines
    assert lines[-1].startswith(f"{len(failed)} to put right")


def test_the_gpus_of_shards_are_those_that_a_model_is_spread_over(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = preflight(capsys, "generation.tensor_parallel_size=2", "num_shards=3")
    assert "ok    quota: dice-gpus allows 8 GPUs, training holds 8, shards 6" in lines


def test_without_any_cluster_every_line_is_clear(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("KFP_HOST", "http://127.0.0.1:9")
    monkeypatch.delenv("DICE_ROOT", raising=False)
    code, lines = preflight(capsys)
    assert code == 1
    assert [line.split()[0] for line in lines] == ["ok", "ok", "FAIL", "FAIL", "?", "FAIL", "3"]
    assert "cannot be reached (Connection refused): set KFP_HOST" in lines[2]
    assert "set KUBECONFIG, or name a context of it" in lines[3]
    assert "DICE_ROOT=s3://bucket/prefix" in lines[5]


def of_registry(tag: str) -> list[str]:
    return [f"registry.example.com/dice/dice-{name}:{tag}" for name in ("core", "generate", "train")]


def test_images_of_a_registry_are_not_looked_for_on_the_nodes(cluster: ClusterObjects) -> None:
    cluster.objects["/api/v1/nodes"] = []
    assert check_images(KubernetesApi("kubeflow"), of_registry("1")).endswith("dice-train:1, to be pulled")


def test_images_of_changed_sources_are_in_no_registry(cluster: ClusterObjects) -> None:
    with pytest.raises(KubernetesError, match="dice-train:0123456789ab-dirty: built from sources with changes"):
        check_images(KubernetesApi("kubeflow"), of_registry("0123456789ab-dirty"))


def test_a_cluster_that_is_down_is_one_line(
    kfp: KfpServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_cluster({}) as gone:
        monkeypatch.setenv("KUBECONFIG", str(gone.kubeconfig(tmp_path)))
    _, lines = preflight(capsys)
    (line,) = [line for line in lines if "Kubernetes:" in line]
    assert line.startswith("FAIL") and "cannot be reached" in line and "object at 0x" not in line


def test_what_one_may_not_look_at_is_told_and_does_not_fail(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.forbidden |= {"/api/v1/nodes", REVIEWS}
    code, lines = preflight(capsys)
    asked = [line for line in lines if line.startswith("?")]
    assert code == 0 and len(asked) == 6
    assert (
        "kubectl auth can-i create pytorchjobs.kubeflow.org --namespace kubeflow --as system:serviceaccount" in asked[0]
    )


def doubtful(lines: list[str]) -> str:
    (line,) = [line for line in lines if line.startswith("?")]
    return line


def test_what_a_person_may_not_do_later_is_told_and_does_not_fail(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.refused = {"delete pytorchjobs", "get pods/log", "list workflows"}
    code, lines = preflight(capsys)
    assert code == 0
    refused = "you may not list workflows, get pods/log, delete pytorchjobs: make status, logs or cancel will need it"
    assert doubtful(lines).startswith(f"?     your rights: {refused}")


def test_a_volume_of_one_node_is_doubted_where_there_are_several(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.objects[CLAIM]["spec"]["accessModes"] = ["ReadWriteOnce"]
    code, lines = preflight(capsys)
    assert code == 0
    assert doubtful(lines).startswith(
        "?     model cache: claim dice-model-cache is ReadWriteOnce: while pods of one node"
    )
    assert "ReadWriteMany, or SET=cluster.model_cache_claim=" in doubtful(lines)


def test_a_pool_that_is_scaled_to_zero_does_not_fail(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, cpu = cluster.objects["/api/v1/nodes"]
    cpu["status"]["images"] = gpu["status"]["images"]
    cluster.objects["/api/v1/nodes"] = [cpu]
    code, lines = preflight(capsys)
    nodes, disk, driver = (line for line in lines if line.startswith("?"))
    assert code == 0 and nodes.startswith("?     nodes for training: 0 with the labels node.kubernetes.io/")
    assert disk.startswith("?     disks for training: no node of the pool tells")
    assert driver.startswith("?     GPU driver: no node has the label")


def test_what_the_operator_adds_to_workers_is_told(cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = preflight(capsys, "launch.num_nodes=2")
    (line,) = [line for line in lines if "training operator:" in line]
    assert line.startswith("ok") and "alpine:3.10" in line


def test_s3_without_the_right_keys_is_one_line(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    code, lines = preflight(capsys)
    assert code == 1 and [line for line in lines if line.startswith("FAIL  S3, from this machine: http")]


def test_the_cpu_preset_asks_for_no_gpu_and_for_its_secret(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    cluster.objects[f"{NAMESPACE}/secrets/dice-s3"] = {"data": keys}
    laptop = {"metadata": {"name": "kind"}, "spec": {}, "status": copy.deepcopy(NODE["status"])}
    laptop["status"]["allocatable"] = {"cpu": "4", "memory": "16Gi"}
    cluster.objects["/api/v1/nodes"] = [laptop]
    code, lines = preflight(capsys, preset="demo")
    assert code == 0, lines
    assert "ok    nodes for training: 1 of 1 can take a training pod (1 cpu, 6Gi memory)" in lines
    assert not [line for line in lines if "quota" in line]


def _without_role(cluster: ClusterObjects) -> None:
    cluster.objects[f"{NAMESPACE}/serviceaccounts/dice-trainer"] = {"metadata": {}}


def test_who_has_no_role_has_rights_by_pod_identity_where_a_policy_lets_it_ask(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> str:
        return next(line for line in preflight(capsys)[1] if "rights on S3" in line)

    assert told().startswith("ok") and "IRSA: dice-pipeline and dice-trainer have a role" in told()
    _without_role(cluster)
    assert told().startswith("?") and "dice-trainer: no role by IRSA" in told() and "eks-pod-identity" in told()
    cluster.objects[POLICIES] = [
        find(render("components/eks-pod-identity"), "NetworkPolicy", "dice-egress-pod-identity")
    ]
    assert told().startswith("ok") and "EKS Pod Identity" in told()


def test_a_driver_that_no_label_tells_is_not_known(cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]) -> None:
    node(lambda n: n["metadata"]["labels"].pop("nvidia.com/cuda.driver-version.major"))(cluster)
    (line,) = [line for line in preflight(capsys)[1] if "GPU driver" in line]
    assert line.startswith("?") and "nvidia-smi on a node says which there is" in line


def test_the_disks_of_the_nodes_say_which_models_fit(
    cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = [line for line in preflight(capsys)[1] if "disks for training" in line]
    # 200 GiB less 4 GiB, by 26 bytes a parameter.
    assert line.endswith("the smallest offers 215 GB: two checkpoints and the finished model of up to 8.1 billion "
                         "parameters fit, on one node")  # fmt: skip
    code, lines = preflight(capsys, "cluster.trainer_disk=300Gi")
    assert code == 1 and any("offers 209715200Ki ephemeral-storage, 300Gi are needed" in line for line in lines)

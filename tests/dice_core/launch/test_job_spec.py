"""The PyTorchJob that is asked for: what the operator, Istio, Kueue, pod security and S3 need to find in it.

With DICE_TEST_CRD set it is also held against the schema of that definition.
"""

import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dice_core.accelerator import GPU_VARIABLE
from dice_core.launch.job_spec import differing_settings, job_name
from dice_core.launch.pod_spec import COPIED_VARIABLES
from dice_core.launch.pytorchjob import PYTORCH_JOB
from dice_core.launch.settings import LaunchConfig, PodConfig, parse_launch
from dice_core.tracking.variables import PREFIXES
from pipelines.cluster.resources import CACHE_FOLDER
from tests.launchers import sections

URI = "s3://bucket/dice/runs/My_Run.1/iteration-2/train/job.json"
_LAUNCH = LaunchConfig(backend="pytorchjob", num_nodes=3, processes_per_node=8)
PODS = {
    "image": "registry/train:1.0",
    "service_account": "dice-trainer",
    "cpu": "90",
    "memory": "1000Gi",
    "shm_size": "64Gi",
    "model_cache_claim": "dice-model-cache",
    "env": {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "INFO"},
    "labels": {"team": "a"},
    "annotations": {"note": "b"},
    "credentials_secret": "dice-s3",
    "image_pull_secrets": ["registry"],
    "node_selector": {"pool": "a100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "tolerationSeconds": 300.0}],
    "queue_name": "dice",
    "priority_class": "training",
}
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run", "uid": "1-2-3"}


def spec_of(environment: dict[str, str] | None = None, **settings: Any) -> dict[str, Any]:
    launch, pods = parse_launch(*sections(settings))
    return PYTORCH_JOB.body("dice-x", URI, launch, pods, environment=environment or {})


def full_job(owner: dict[str, str] | None = None) -> dict[str, Any]:
    pods = PodConfig.parse(PODS, "pods")
    return PYTORCH_JOB.body("dice-x", URI, _LAUNCH, pods, environment={"AWS_REGION": "r"}, owner=owner)


def pod_of(job: dict[str, Any], role: str = "Master") -> dict[str, Any]:
    return dict(job["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"])


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    [container] = pod_of(job)["containers"]
    return dict(container)


def values_of(job: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container_of(job)["env"]}


def test_the_name_is_a_short_label_that_says_what_and_depends_on_what_is_computed() -> None:
    name = job_name(URI, "f1", 50)
    assert name == job_name(URI, "f1", 50)
    assert name.startswith("dice-my-run-1-iteration-2-train-")
    assert len({name, job_name(URI, "f2", 50), job_name(URI.replace("iteration-2", "iteration-3"), "f1", 50)}) == 3
    # The operator adds -worker-<index>, and names services so.
    longest = job_name(f"s3://bucket/{'long-' * 30}/iteration-1/train/job.json", "f1", 50)
    assert len(longest) <= 50
    assert not longest.endswith("-")
    assert job_name("/tmp/job.json", "", 50).startswith("dice-")


def test_the_job_of_a_run_is_labelled_with_its_name() -> None:
    places = {
        "s3://bucket/runs/dice/runs/zephyr-1/iteration-2/train/job.json": "zephyr-1",
        "s3://bucket/policy-1/job.json": None,
        "s3://bucket/runs/No Label/job.json": None,
    }
    for place, run in places.items():
        job = PYTORCH_JOB.body("dice-x", place, LaunchConfig(), PodConfig(image="train:1"), environment={})
        assert job["metadata"]["labels"].get("dice-suite/run") == run


def test_one_pod_by_default_makes_its_own_rendezvous() -> None:
    job = spec_of(processes_per_node=8)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Master"]
    assert job["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    command = container_of(job)["command"]
    assert command[:3] == ["python", "-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=8"} <= set(command)
    assert command[-3:] == ["--module", "dice_core.training.worker", URI]
    assert container_of(job)["resources"]["limits"] == {"nvidia.com/gpu": "8"}


def test_several_nodes_are_a_number_and_meet_where_the_operator_says() -> None:
    job = spec_of(num_nodes=4, processes_per_node=8)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {role: replica["replicas"] for role, replica in replicas.items()} == {"Master": 1, "Worker": 3}
    # torchrun reads PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, ..., which the operator sets from this.
    assert job["spec"]["nprocPerNode"] == "8"
    assert not [part for part in container_of(job)["command"] if "standalone" in part or "nproc" in part]
    assert pod_of(job, "Master") == pod_of(job, "Worker")


def test_the_run_policy_and_restarts_are_the_settings() -> None:
    job = spec_of(backoff_limit=1, restart_policy="Never", clean_pod_policy="All", ttl_seconds_after_finished=60)
    assert job["spec"]["runPolicy"] == {
        "cleanPodPolicy": "All",
        "ttlSecondsAfterFinished": 60,
        # The launcher ends the training at 172,800 s; the operator, which counts the wait too, whatever is left.
        "activeDeadlineSeconds": 172_800 + 1800,
        "backoffLimit": 1,
    }
    assert job["spec"]["pytorchReplicaSpecs"]["Master"]["restartPolicy"] == "Never"


def test_a_pod_told_to_stop_has_two_minutes_and_its_processes_a_little_less() -> None:
    job = spec_of(num_nodes=2)
    assert [pod_of(job, role)["terminationGracePeriodSeconds"] for role in ("Master", "Worker")] == [120, 120]
    # torchrun's own 30 seconds would cut the upload of a checkpoint.
    assert values_of(job)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "110"


def test_pods_carry_no_sidecar_and_the_labels_that_network_policies_select() -> None:
    template = spec_of()["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    labels, annotations = template["metadata"]["labels"], template["metadata"]["annotations"]
    assert labels["sidecar.istio.io/inject"] == annotations["sidecar.istio.io/inject"] == "false"
    assert labels["app.kubernetes.io/part-of"] == "dice-suite"
    assert labels["app.kubernetes.io/component"] == "training"


def test_pods_carry_the_labels_and_annotations_of_the_settings_beside_the_suites_own() -> None:
    own = "app.kubernetes.io/part-of"
    job = spec_of(num_nodes=2, labels={"team": "a", own: "other"}, annotations={"note": "b"})
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        metadata = replica["template"]["metadata"]
        assert (metadata["labels"]["team"], metadata["labels"][own]) == ("a", "dice-suite")
        assert (metadata["annotations"]["note"], metadata["annotations"]["sidecar.istio.io/inject"]) == ("b", "false")


def test_pods_run_as_nobody_special_on_a_read_only_root_with_room_where_it_is_needed() -> None:
    job = spec_of(shm_size="64Gi", model_cache_claim="models")
    pod, container = pod_of(job), container_of(job)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    places = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert places == {
        "/tmp": {"emptyDir": {}},
        "/cache": {"persistentVolumeClaim": {"claimName": "models"}},
        "/scratch": {"emptyDir": {}},
        "/dev/shm": {"emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
    }
    values = values_of(job)
    assert (values["DICE_SCRATCH"], values["HOME"]) == ("/scratch", "/tmp")


def test_a_user_of_0_leaves_the_choice_to_the_cluster_and_still_refuses_root() -> None:
    by_default, chosen = (pod_of(spec_of(**settings))["securityContext"] for settings in ({}, {"run_as_user": 0}))
    users = {name: 10001 for name in ("runAsUser", "runAsGroup", "fsGroup")}
    assert by_default == chosen | users
    assert chosen["runAsNonRoot"] is True and not users.keys() & chosen.keys()


def test_training_keeps_models_where_the_images_and_the_other_tasks_do() -> None:
    dockerfile = Path(__file__).parents[3] / "images" / "Dockerfile"
    in_images = set(re.findall(r"\bDICE_CACHE=(\S+)", dockerfile.read_text()))
    assert in_images == {values_of(spec_of())["DICE_CACHE"]} == {f"{CACHE_FOLDER}/models"}


def test_without_a_claim_or_shared_memory_there_are_empty_folders_only() -> None:
    job = spec_of()
    assert [volume["name"] for volume in pod_of(job)["volumes"]] == ["tmp", "cache", "scratch"]
    assert all("emptyDir" in volume for volume in pod_of(job)["volumes"])


def test_where_s3_is_comes_from_the_launcher_and_credentials_from_a_secret_never_by_value() -> None:
    environment = {
        "AWS_ENDPOINT_URL": "http://s3:8333",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": "",
        "AWS_ACCESS_KEY_ID": "THE-KEY",
        "AWS_SECRET_ACCESS_KEY": "THE-SECRET",
        "AWS_SESSION_TOKEN": "THE-TOKEN",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
        "AWS_PROFILE": "mine",
    }
    job = spec_of(environment, credentials_secret="dice-s3")
    variables = {variable["name"]: variable for variable in container_of(job)["env"]}
    assert variables["AWS_ENDPOINT_URL"]["value"] == "http://s3:8333"
    assert {name for name in variables if name.startswith("AWS_")} == {
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    }
    assert variables["AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"] == {
        "name": "dice-s3",
        "key": "AWS_ACCESS_KEY_ID",
    }
    assert not [text for text in ("THE-KEY", "THE-SECRET", "THE-TOKEN") if text in str(job)]
    with_account = values_of(spec_of(environment, service_account="dice-trainer"))
    assert not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"} & with_account.keys()
    assert not [name for name in COPIED_VARIABLES if "KEY" in name or "TOKEN" in name]


def test_what_the_launcher_knows_of_trackers_reaches_the_pods_and_secrets_as_references_alone() -> None:
    environment = {
        "MLFLOW_TRACKING_URI": "https://mlflow.example.com",
        "MLFLOW_EXPERIMENT_ID": "3",
        "MLFLOW_WORKSPACE": "team",
        "MLFLOW_TRACKING_USERNAME": "me@example.com",
        "WANDB_PROJECT": "dice",
        # Of the launcher's own pod and task.
        "MLFLOW_RUN_ID": "of-the-task",
        "MLFLOW_TRACKING_AUTH": "kubernetes",
        "MLFLOW_TRACKING_TOKEN": "THE-TOKEN",
        "WANDB_API_KEY": "THE-KEY",
    }
    keys = ["MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"]
    job = spec_of(environment, tracking_secret="trackers", tracking_secret_keys=keys)
    variables = {variable["name"]: variable for variable in container_of(job)["env"]}
    plain = {
        name: entry["value"] for name, entry in variables.items() if name.startswith(PREFIXES) and "value" in entry
    }
    assert plain == {
        name: environment[name]
        for name in (
            "MLFLOW_TRACKING_URI",
            "MLFLOW_EXPERIMENT_ID",
            "MLFLOW_WORKSPACE",
            "MLFLOW_TRACKING_USERNAME",
            "WANDB_PROJECT",
        )
    }
    for name in keys:
        assert variables[name]["valueFrom"]["secretKeyRef"] == {"name": "trackers", "key": name}
    for without_secret in (spec_of(environment), job):
        assert "THE-" not in str(without_secret)
    hidden = spec_of({"MLFLOW_TRACKING_URI": "https://me:THE-PASSWORD@mlflow.example.com"})
    assert "THE-PASSWORD" not in str(hidden)


def test_another_tracker_is_no_reason_to_start_a_waiting_job_anew() -> None:
    one, other = (spec_of({"MLFLOW_TRACKING_URI": uri}) for uri in ("https://a", "https://b"))
    assert differing_settings(one, other) == []


def test_a_users_variables_win_over_the_built_in_ones() -> None:
    values = values_of(spec_of(env={"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "eth0"}))
    assert (values["NCCL_DEBUG"], values["NCCL_SOCKET_IFNAME"]) == ("INFO", "eth0")


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ({"cpu": "90", "processes_per_node": 8}, "11"),
        ({"cpu": "500m", "processes_per_node": 2}, "1"),
        ({"cpu": "1"}, ""),
        ({"cpu": "90", "processes_per_node": 8, "env": {"OMP_NUM_THREADS": "4"}}, "4"),
        ({}, ""),
    ],
)
def test_processes_share_the_cores_of_their_pod(settings: dict[str, Any], threads: str) -> None:
    assert values_of(spec_of(**settings)).get("OMP_NUM_THREADS", "") == threads


def test_pods_that_ask_for_gpus_are_told_so() -> None:
    assert values_of(spec_of(gpu_resource="nvidia.com/gpu"))[GPU_VARIABLE] == "1"
    assert GPU_VARIABLE not in values_of(spec_of(gpu_resource=""))


def test_place_access_and_queue_are_the_settings() -> None:
    job = full_job(owner=OWNER)
    pod = pod_of(job, "Worker")
    assert pod["serviceAccountName"] == "dice-trainer"
    assert pod["nodeSelector"] == {"pool": "a100"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "tolerationSeconds": 300}]
    assert isinstance(pod["tolerations"][0]["tolerationSeconds"], int)
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["priorityClassName"] == "training"
    assert container_of(job)["resources"] == {
        "requests": {"cpu": "90", "memory": "1000Gi", "nvidia.com/gpu": "8"},
        "limits": {"memory": "1000Gi", "nvidia.com/gpu": "8"},
    }
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "dice"
    assert job["spec"]["runPolicy"]["suspend"] is True
    assert job["metadata"]["ownerReferences"] == [OWNER]


def test_on_a_cluster_without_gpus_none_is_asked_for() -> None:
    assert container_of(spec_of(gpu_resource="", memory="2Gi"))["resources"] == {
        "requests": {"memory": "2Gi"},
        "limits": {"memory": "2Gi"},
    }


# The parts of the definition (kubeflow.org/v1, the same in v1.7.0 and v1.9.4) that we set, by hand.
_RUN_POLICY = {
    "cleanPodPolicy": str,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "suspend": bool,
}
_POLICIES = ("Always", "OnFailure", "Never", "ExitCode")


def test_the_job_has_the_fields_and_types_of_the_definition() -> None:
    job = full_job(owner=OWNER)
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job["spec"]) == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    assert isinstance(job["spec"]["nprocPerNode"], str)
    for name, value in job["spec"]["runPolicy"].items():
        assert type(value) is _RUN_POLICY[name]
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] in _POLICIES
        # The operator finds its container by name.
        assert [container["name"] for container in replica["template"]["spec"]["containers"]] == ["pytorch"]


def test_the_pod_fits_the_schema_of_kubernetes() -> None:
    job = full_job()
    template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "x", **template["metadata"]}}
    kubernetes_validate.validate(pod, "1.30", strict=True)
    # The schema has been looked at: the same pod with a slip in a field is refused.
    slip = {**pod, "spec": {**pod["spec"], "nodeSelectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectors"):
        kubernetes_validate.validate(slip, "1.30", strict=True)


def test_the_job_fits_the_schema_of_the_definition_on_hand() -> None:
    path = os.environ.get("DICE_TEST_CRD", "")
    definition = yaml.safe_load(Path(path).read_text()) if path else _excerpt()
    [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    for job in (full_job(), spec_of({"AWS_REGION": "r"})):
        jsonschema.validate(job, schema)
        assert list(pruned(job["spec"], schema["properties"]["spec"], "spec")) == []


def _excerpt() -> dict[str, Any]:
    """Return the few lines of the definition that say more than types; pods are any object here."""
    replica = {
        "type": "object",
        "properties": {
            "replicas": {"type": "integer", "format": "int32"},
            "restartPolicy": {"type": "string"},
            "template": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        },
    }
    policy = {"properties": {name: {} for name in _RUN_POLICY}, "type": "object"}
    spec = {
        "type": "object",
        "required": ["pytorchReplicaSpecs"],
        "properties": {
            "nprocPerNode": {"type": "string"},
            "runPolicy": policy,
            "pytorchReplicaSpecs": {"type": "object", "additionalProperties": replica},
        },
    }
    schema = {"type": "object", "properties": {"spec": spec}}
    return {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}


def pruned(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    """Return the fields that an API server drops without a word, because the schema does not know them."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    if isinstance(value, list):
        return [field for item in value for field in pruned(item, schema.get("items", {}), f"{path}[]")]
    if not isinstance(value, dict):
        return []
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    unknown = [] if others else [f"{path}.{name}" for name in value if name not in known]
    inner = {name: known.get(name) or others for name in value if known.get(name) or others}
    return unknown + [
        field
        for name, its in inner.items()
        if isinstance(its, dict)
        for field in pruned(value[name], its, f"{path}.{name}")
    ]

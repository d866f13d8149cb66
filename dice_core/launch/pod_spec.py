"""What a training pod runs and has, whatever kind of job it belongs to. Pure: settings in, parts of a pod out.

A pod runs torchrun once: alone it makes its own rendezvous, several take that of whoever controls the job (PET_NNODES,
PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, which torchrun reads as its own options).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dice_core.accelerator import GPU_VARIABLE
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.settings.quantities import POD_VOLUMES, quantity
from dice_core.tracking.variables import passed_on

TORCHRUN = ("python", "-m", "torch.distributed.run", "--max-restarts=0", "--tee=3")
WORKER_MODULE = "dice_core.training.worker"

GRACE_SECONDS = 120
"""How long a training pod that is told to stop may store its newest checkpoint: one of 1.6 GB took 27 s on one disk."""
# torchrun kills its processes before the kubelet kills torchrun, which then says so.
_TORCHRUN_GRACE_SECONDS = GRACE_SECONDS - 10

COPIED_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "AWS_RETRY_MODE",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AWS_STS_REGIONAL_ENDPOINTS",
    "AWS_EC2_METADATA_DISABLED",
)
"""What the launcher's environment says of S3 and the pods must know too. No credentials, and nothing that points to
files or identities of the launcher's own pod: a job can be read by more people than a secret."""
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")

_NO_SIDECAR = {"sidecar.istio.io/inject": "false"}
SUITE_LABELS = {"app.kubernetes.io/part-of": "dice-suite", "app.kubernetes.io/component": "training"}
_CACHE, _SCRATCH = POD_VOLUMES["cache"], POD_VOLUMES["scratch"]
_DEFAULT_VARIABLES = {
    "PYTHONUNBUFFERED": "1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_TORCHRUN_GRACE_SECONDS),
    # DeepSpeed's calls into torch would fill the log with deprecations.
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "HOME": "/tmp",
    # As in the images: every pod that has the claim finds a model where another has put it.
    "DICE_CACHE": f"{_CACHE}/models",
    "DICE_SCRATCH": _SCRATCH,
    # One line about the version, and errors; a process whose peer is gone ends instead of waiting for ever.
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}


def command_of(launch: LaunchConfig, job_uri: str, command: Sequence[str] = ()) -> list[str]:
    """Return what each pod runs.

    Args:
        launch: how many processes, and pods.
        job_uri: what the processes are given.
        command: instead of torchrun with the training module; the job's URI is added.
    """
    # A single pod needs no name service and no open port to find itself.
    alone = ["--standalone", f"--nproc-per-node={launch.processes_per_node}"] if launch.num_nodes == 1 else []
    return [*(command or [*TORCHRUN, *alone, "--module", WORKER_MODULE]), job_uri]


def container_of(
    name: str, command: Sequence[str], num_processes: int, pods: PodConfig, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Return the container of a pod.

    Args:
        name: which whoever controls the job finds it by.
        command: from command_of.
        num_processes: of the pod; it asks for a GPU for each.
        pods: what the pods look like.
        environment: the launcher's own; COPIED_VARIABLES and those of trackers are taken from it.
    """
    requests = {"cpu": pods.cpu, "memory": pods.memory, "ephemeral-storage": pods.disk, **pods.extra_resources}
    # A limit of CPUs would only slow training down; one of memory protects the other pods of the node.
    limits = {"memory": pods.memory, **pods.extra_resources}
    if pods.gpu_resource:
        requests[pods.gpu_resource] = limits[pods.gpu_resource] = str(num_processes)
    mounts = POD_VOLUMES | {volume["name"]: volume["mount_path"] for volume in pods.volumes}
    return {
        "name": name,
        "image": pods.image,
        "command": list(command),
        "env": _variables(num_processes, pods, environment),
        "resources": {
            "requests": {name: amount for name, amount in requests.items() if amount},
            "limits": {name: amount for name, amount in limits.items() if amount},
        },
        "volumeMounts": [{"name": volume["name"], "mountPath": mounts[volume["name"]]} for volume in _volumes(pods)],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], **({"add": list(pods.capabilities)} if pods.capabilities else {})},
        },
        # What a process printed last is in the pod's status too, and outlives the pod's log.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def pod_template(container: Mapping[str, Any], pods: PodConfig) -> dict[str, Any]:
    """Return the template of a pod, metadata and spec, around its container."""
    user = pods.run_as_user
    spec: dict[str, Any] = {
        "containers": [container],
        "volumes": _volumes(pods),
        "securityContext": {
            "runAsNonRoot": True,
            **({name: user for name in ("runAsUser", "runAsGroup", "fsGroup")} if user else {}),
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # The training uses no Kubernetes API; IRSA's own token is mounted regardless.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
    }
    optional = {
        "serviceAccountName": pods.service_account,
        "priorityClassName": pods.priority_class,
        "nodeSelector": pods.node_selector,
        "tolerations": pods.tolerations,
        "imagePullSecrets": [{"name": secret} for secret in pods.image_pull_secrets],
    }
    spec |= {key: value for key, value in optional.items() if value}
    # Istio reads the annotation in older versions and the label in newer ones.
    metadata = {
        "labels": {**pods.labels, **SUITE_LABELS, **_NO_SIDECAR},
        "annotations": {**_NO_SIDECAR, **pods.annotations},
    }
    return {"metadata": metadata, "spec": spec}


def copied_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the launcher's environment says of S3."""
    return {name: environment[name] for name in COPIED_VARIABLES if environment.get(name)}


def _variables(num_processes: int, pods: PodConfig, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    promised = {GPU_VARIABLE: "1"} if pods.gpu_resource else {}
    threads = _threads(num_processes, pods.cpu)
    secret = dict.fromkeys(CREDENTIALS, pods.credentials_secret) if pods.credentials_secret else {}
    secret |= dict.fromkeys(pods.tracking_secret_keys, pods.tracking_secret) if pods.tracking_secret else {}
    copied = {**copied_variables(environment), **passed_on(environment)}
    values = {**_DEFAULT_VARIABLES, **promised, **threads, **copied, **pods.env}
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in values.items() if name not in secret
    ]
    for name, holder in secret.items():
        variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": holder, "key": name}}})
    return variables


def _threads(num_processes: int, cpu: str) -> dict[str, str]:
    """Share the cores out: torchrun gives each of several processes one, and all GPUs wait for rank 0's work on them.

    A single process takes what the node has: `cpu` is what it asks for, no limit.
    """
    if not cpu or num_processes == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, int(quantity(cpu)) // num_processes))}


def _volumes(pods: PodConfig) -> list[dict[str, Any]]:
    claim = {"persistentVolumeClaim": {"claimName": pods.model_cache_claim}}
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache", **(claim if pods.model_cache_claim else {"emptyDir": {}})},
        # Checkpoints stay on the node: the claim may be shared by all pods, and slow.
        {"name": "scratch", **(pods.scratch_volume or {"emptyDir": {}})},
        *({"name": volume["name"], **volume["source"]} for volume in pods.volumes),
    ]
    if pods.shm_size:
        volumes.append({"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": pods.shm_size}})
    return volumes

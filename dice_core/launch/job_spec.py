"""The PyTorchJob of a training run, as the training operator (v1.7 to v1.9) takes it. Pure: settings in, a dict out.

One pod, the Master, holds a node's processes; further nodes are Workers. Each pod runs torchrun once: alone it makes
its own rendezvous, several take the operator's (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, which
torchrun reads as its own options).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dice_core.accelerator import GPU_VARIABLE
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.settings.quantities import POD_VOLUMES, quantity
from dice_core.storage import layout
from dice_core.tracking.variables import passed_on

GROUP, VERSION, PLURAL, KIND = "kubeflow.org", "v1", "pytorchjobs", "PyTorchJob"
CONTAINER = "pytorch"
"""The operator demands a container of this name."""
JOB_NAME_LABEL = "training.kubeflow.org/job-name"
REPLICA_TYPE_LABEL = "training.kubeflow.org/replica-type"
REPLICA_INDEX_LABEL = "training.kubeflow.org/replica-index"
JOB_URI_ANNOTATION = "dice-suite/job-uri"
LAUNCH_ANNOTATION = "dice-suite/launch"
"""The settings that a job was made with, as JSON."""
RUN_LABEL = "dice-suite/run"
"""Of a job that a run started: what a person deletes by."""
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

# A pod's and a service's name is the job's plus "-worker-<index>", and may have 63 characters.
_MAX_NAME = 50
_NO_SIDECAR = {"sidecar.istio.io/inject": "false"}
_LABELS = {"app.kubernetes.io/part-of": "dice-suite", "app.kubernetes.io/component": "training"}
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
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


def job_name(job_uri: str, fingerprint: str) -> str:
    """Return the name of a job: the same for the same training, so that a retried launcher finds it.

    Args:
        job_uri: where the job is stored; its last folders make the name readable.
        fingerprint: of what it computes: other settings at the same place are another job.

    Returns:
        A DNS label of at most 50 characters that begins with a letter.
    """
    digest = hashlib.sha256(f"{job_uri}\n{fingerprint}".encode()).hexdigest()[:10]
    folders = [part for part in job_uri.partition("://")[2].split("/")[1:-1] or job_uri.split("/")[:-1] if part]
    readable = re.sub(r"[^a-z0-9]+", "-", "-".join(folders[-3:]).lower()).strip("-")
    kept = readable[-(_MAX_NAME - len("dice--") - len(digest)) :].strip("-")
    return "-".join(part for part in ("dice", kept, digest) if part)


def training_job(
    name: str,
    job_uri: str,
    launch: LaunchConfig,
    pods: PodConfig,
    *,
    environment: Mapping[str, str],
    owner: Mapping[str, Any] | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the PyTorchJob to create.

    Args:
        name: from job_name.
        job_uri: what the processes are given.
        launch: which processes the pods run.
        pods: what the pods look like.
        environment: the launcher's own; COPIED_VARIABLES and those of trackers are taken from it.
        owner: an ownerReference: deleting that object deletes the job.
        command: instead of torchrun with the training module; the job's URI is added.
    """
    container = _container([*(command or _torchrun(launch)), job_uri], launch.processes_per_node, pods, environment)
    replicas = {"Master": _replica(1, container, launch.restart_policy, pods)}
    if launch.num_nodes > 1:
        replicas["Worker"] = _replica(launch.num_nodes - 1, container, launch.restart_policy, pods)
    run = layout.run_of(job_uri)
    metadata: dict[str, Any] = {
        "name": name,
        "labels": {**_LABELS, **({RUN_LABEL: run} if run else {})},
        "annotations": {JOB_URI_ANNOTATION: job_uri, LAUNCH_ANNOTATION: _made_with(launch, pods, environment)},
    }
    run_policy: dict[str, Any] = {
        "cleanPodPolicy": pods.clean_pod_policy,
        "ttlSecondsAfterFinished": pods.ttl_seconds_after_finished,
        # The operator counts from when it first saw the job, the wait for nodes included; the launcher counts better.
        "activeDeadlineSeconds": pods.active_deadline_seconds + pods.pending_deadline_seconds,
        "backoffLimit": launch.backoff_limit,
    }
    if pods.queue_name:
        # Kueue takes the job out of suspension when it admits it.
        metadata["labels"][_QUEUE_LABEL] = pods.queue_name
        run_policy["suspend"] = True
    if owner:
        metadata["ownerReferences"] = [dict(owner)]
    spec = {
        "nprocPerNode": str(launch.processes_per_node),
        "runPolicy": run_policy,
        "pytorchReplicaSpecs": replicas,
    }
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": metadata, "spec": spec}


def differing_settings(job: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that two jobs from training_job were not made alike with."""
    one, two = (
        json.loads(made["metadata"].get("annotations", {}).get(LAUNCH_ANNOTATION, "{}")) for made in (job, other)
    )
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def _made_with(launch: LaunchConfig, pods: PodConfig, environment: Mapping[str, str]) -> str:
    sections = {"launch": launch.to_dict(), "pods": pods.to_dict()}
    # The launcher that is stopped decides what becomes of the job, not the one that made it.
    del sections["launch"]["on_cancel"]
    settings = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    return json.dumps({**settings, "variables of S3": _copied(environment)}, sort_keys=True)


def _torchrun(launch: LaunchConfig) -> list[str]:
    # A single pod needs no name service and no open port to find itself.
    alone = ["--standalone", f"--nproc-per-node={launch.processes_per_node}"] if launch.num_nodes == 1 else []
    return [*TORCHRUN, *alone, "--module", WORKER_MODULE]


def _replica(number: int, container: Mapping[str, Any], restart_policy: str, pods: PodConfig) -> dict[str, Any]:
    user = pods.run_as_user
    pod: dict[str, Any] = {
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
    pod |= {key: value for key, value in optional.items() if value}
    # Istio reads the annotation in older versions and the label in newer ones.
    metadata = {
        "labels": {**pods.labels, **_LABELS, **_NO_SIDECAR},
        "annotations": {**_NO_SIDECAR, **pods.annotations},
    }
    return {
        "replicas": number,
        "restartPolicy": restart_policy,
        "template": {"metadata": metadata, "spec": pod},
    }


def _container(
    command: list[str], num_processes: int, pods: PodConfig, environment: Mapping[str, str]
) -> dict[str, Any]:
    requests = {"cpu": pods.cpu, "memory": pods.memory, "ephemeral-storage": pods.disk, **pods.extra_resources}
    # A limit of CPUs would only slow training down; one of memory protects the other pods of the node.
    limits = {"memory": pods.memory, **pods.extra_resources}
    if pods.gpu_resource:
        requests[pods.gpu_resource] = limits[pods.gpu_resource] = str(num_processes)
    mounts = POD_VOLUMES | {volume["name"]: volume["mount_path"] for volume in pods.volumes}
    return {
        "name": CONTAINER,
        "image": pods.image,
        "command": command,
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


def _variables(num_processes: int, pods: PodConfig, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    promised = {GPU_VARIABLE: "1"} if pods.gpu_resource else {}
    threads = _threads(num_processes, pods.cpu)
    secret = dict.fromkeys(CREDENTIALS, pods.credentials_secret) if pods.credentials_secret else {}
    secret |= dict.fromkeys(pods.tracking_secret_keys, pods.tracking_secret) if pods.tracking_secret else {}
    copied = {**_copied(environment), **passed_on(environment)}
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


def _copied(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in COPIED_VARIABLES if environment.get(name)}


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

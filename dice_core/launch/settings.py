"""Settings of training's processes, and of the pods that they run in on a cluster."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dice_core.settings.base import ConfigError, Int, Names, Settings, Values
from dice_core.settings.quantities import (
    Annotations,
    Capabilities,
    Labels,
    OptionalQuantity,
    Resources,
    Tolerations,
    Volumes,
    VolumeSource,
)


class LaunchConfig(Settings):
    """Which processes train, and what ends them. Decides no result: `training` fixes the global batch."""

    backend: Literal["torchrun", "pytorchjob", "trainjob"] = "torchrun"
    """`torchrun` starts the processes on this machine, `pytorchjob` in pods of a cluster with the training operator
    (v1), `trainjob` in those of one with Kubeflow Trainer (v2)."""
    num_nodes: Int = Field(default=1, ge=1)
    """Pods. One with all GPUs of a machine needs no gang scheduling and no network between pods."""
    processes_per_node: Int = Field(default=1, ge=1)
    """GPUs of a node, or CPU processes."""
    restart_policy: Literal["OnFailure", "ExitCode", "Never"] = "OnFailure"
    """`OnFailure` restarts a failed pod up to backoff_limit times; it resumes from its checkpoint. `ExitCode` restarts
    after a signal or eviction only, without limit but the deadline; `Never` leaves retries to the pipeline. What the
    training knows to fail again (pairs, settings, a loss that is not finite) is not tried again in the same run. For
    `pytorchjob`, and without `ExitCode` for `trainjob`, whose pods are all started again where one fails or goes."""
    backoff_limit: Int = Field(default=3, ge=0)
    """Restarts of failed pods, all together, before the job has failed. For `pytorchjob` and `trainjob`."""
    on_cancel: Literal["delete", "leave"] = "delete"
    """What becomes of the job when its run is stopped. A launcher that has to leave its node always leaves it to the
    next attempt. For `pytorchjob` and `trainjob`."""

    @model_validator(mode="after")
    def _torchrun_has_one_node(self) -> Self:
        if self.backend == "torchrun" and self.num_nodes > 1:
            raise ValueError(
                f"num_nodes must be 1 with backend 'torchrun', which has one machine, got {self.num_nodes}"
            )
        return self


class PodConfig(Settings):
    """What the pods of `pytorchjob` and `trainjob` look like. A pipeline derives it all from its section `cluster`."""

    image: str = ""
    """Of the training pods; it has no default."""
    service_account: str = ""
    """Of the training pods: they need S3 and no right on the Kubernetes API. Empty: the namespace's default account."""
    gpu_resource: str = "nvidia.com/gpu"
    """Asked for once for each process; empty: no GPU."""
    cpu: OptionalQuantity = ""
    """Request of a pod, such as "90"; empty: none."""
    memory: OptionalQuantity = ""
    """Request and limit of a pod, such as "1000Gi"; shared memory in use counts. Empty: none."""
    disk: OptionalQuantity = ""
    """Request of a pod for its node's disk (ephemeral-storage), such as "250Gi"; empty: what checkpoints, the finished
    model and, without a cache, the policy take, by the number of parameters."""
    shm_size: OptionalQuantity = ""
    """Size of /dev/shm in memory, such as "64Gi"; empty: the container runtime's own (64 MB with most)."""
    extra_resources: Resources = Field(default_factory=dict)
    """More of what a node offers, a number for each name, such as {"vpc.amazonaws.com/efa": "4"},
    {"rdma/rdma_shared_device_a": "1"} or {"hugepages-2Mi": "5Gi"}. Requests and limits of a pod."""
    capabilities: Capabilities = ()
    """Linux capabilities of the pods, such as IPC_LOCK, with which RDMA locks its memory. Pod Security
    `restricted` refuses them."""
    volumes: Volumes = Field(default_factory=list)
    """More volumes of the pods: name, mount_path, and source as Kubernetes writes it."""
    scratch_volume: VolumeSource = Field(default_factory=dict)
    """What the pods write checkpoints on, such as {"hostPath": {"path": "/mnt/k8s-disks/0/dice"}} for a node's
    NVMe disks, or a generic ephemeral volume. Empty: the disk that the node's kubelet uses."""
    model_cache_claim: str = ""
    """Volume claim to keep models on; empty: each pod downloads its own."""
    run_as_user: Int = Field(default=10001, ge=0)
    """User and group of the processes. 0 leaves the choice to the cluster (OpenShift); root is refused either way."""
    env: dict[str, str] = Field(default_factory=dict)
    """More environment variables of the pods, such as NCCL_SOCKET_IFNAME; they win over the built-in ones."""
    labels: Labels = Field(default_factory=dict)
    """More labels of the pods, such as a cost centre; the suite's own win."""
    annotations: Annotations = Field(default_factory=dict)
    """More annotations of the pods."""
    credentials_secret: str = ""
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; empty: the service account gives access."""
    tracking_secret: str = ""
    """Secret whose keys become variables of the pods: what trackers ask for. Empty: none."""
    tracking_secret_keys: Names = ()
    """Of that secret; each is the variable of its name, such as MLFLOW_TRACKING_TOKEN."""
    image_pull_secrets: Names = ()
    """Secrets to pull the image with."""
    node_selector: Labels = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: Tolerations = Field(default_factory=list)
    """Taints of nodes that the pods tolerate."""
    training_runtime: str = Field(default="dice-torch", min_length=1)
    """TrainingRuntime of the namespace that a TrainJob's pods are made by: the suite's, or one that was made from it.
    For backend `trainjob`."""
    queue_name: str = ""
    """Kueue's LocalQueue: the job is created suspended and starts when Kueue admits it. Empty: no queue."""
    priority_class: str = ""
    """Of the pods; empty: the cluster's default. A TrainJob's pods have that of their TrainingRuntime."""
    pending_deadline_seconds: Int = Field(default=1800, ge=1)
    """A job whose pods have not all started by then is deleted, with the reason. Time in Kueue's queue is not
    counted."""
    active_deadline_seconds: Int = Field(default=172_800, ge=1)
    """A job that has trained for so long is deleted; waiting for pods is not counted. Whoever controls the job counts
    that too and is given pending_deadline_seconds more: it ends a job that no launcher follows."""
    ttl_seconds_after_finished: Int = Field(default=86_400, ge=0)
    """The finished job stays for so long; its pods' logs can be read meanwhile. A TrainJob stays as long as its run."""
    clean_pod_policy: Literal["Running", "All", "None"] = "Running"
    """Which pods the operator deletes when the job ends. A TrainJob's that have ended stay."""


_LEFT_TO_RUNTIME = {
    "clean_pod_policy": "pods that have ended stay until the job is deleted",
    "ttl_seconds_after_finished": "it stays until the workflow of its run is deleted",
    "priority_class": "name a TrainingRuntime in pods.training_runtime whose pod has priorityClassName",
}
"""Settings of the pods that a TrainJob cannot hand on, and what holds or can be done instead."""


def parse_launch(launch: Values, pods: Values) -> tuple[LaunchConfig, PodConfig]:
    """Build both sections from plain mappings.

    Raises:
        ConfigError: one line: a field at fault, pods for a backend that starts none, or no image for one that does.
    """
    config, pod_config = LaunchConfig.parse(launch, "launch"), PodConfig.parse(pods, "pods")
    if config.backend == "torchrun":
        if pods:
            raise ConfigError(
                f"launch.backend: 'torchrun' starts no pods, and pods.{next(iter(pods))} is set: leave out section "
                "pods, or set launch.backend to pytorchjob or trainjob"
            )
        return config, pod_config
    if not pod_config.image:
        raise ConfigError(f"pods.image: backend {config.backend!r} needs the image of the training pods, got ''")
    if config.backend == "trainjob":
        _check_train_job(config, pod_config)
    return config, pod_config


def _check_train_job(launch: LaunchConfig, pods: PodConfig) -> None:
    """Refuse what a TrainJob would not do, though it was asked for."""
    if launch.restart_policy == "ExitCode":
        raise ConfigError(
            "launch.restart_policy: must be OnFailure or Never with backend 'trainjob', which knows no exit codes of "
            "single pods, got 'ExitCode'"
        )
    for name, instead in _LEFT_TO_RUNTIME.items():
        value, default = getattr(pods, name), PodConfig.model_fields[name].default
        if value != default:
            raise ConfigError(f"pods.{name}: a TrainJob cannot set it, leave it out, got {value!r}: {instead}")

"""Where the tasks of a preset run on a cluster, and with what: section `cluster` of a preset.

It owns every setting of pods, nodes, times and access, those of the training pods too. Fixed when a pipeline is
compiled, so that none of it is a parameter of a run. resources.py puts it on the tasks, training_pods.py on the pods of
training; preflight looks whether the cluster has it.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dice_core.settings.base import Int, Names, Settings
from dice_core.settings.durations import to_seconds
from dice_core.settings.quantities import (
    Annotations,
    Capabilities,
    Labels,
    OptionalQuantity,
    Quantity,
    Resources,
    Tolerations,
    Volumes,
    VolumeSource,
    checked,
    quantity,
)
from dice_core.stages.table import Stage
from dice_core.tracking import variables as tracking

PIPELINE_ACCOUNT = "dice-pipeline"
CONFIG_MAP, CONFIG_KEYS = "dice-config", ("AWS_ENDPOINT_URL", "AWS_REGION")
CREDENTIAL_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
ATTEMPT_VARIABLE, ATTEMPT_FIELD = "ARGO_NODE_NAME", "metadata.annotations['workflows.argoproj.io/node-name']"
"""What a task is told of its attempt: a later one does not repeat what every attempt would meet (stages.attempts)."""
RUN_ID_VARIABLE, RUN_ID_FIELD = "KFP_RUN_ID", "metadata.labels['pipeline/runid']"
"""What the tasks that name a run are told: KFP's launcher resolves no placeholder in their inputs."""
_OWN_VARIABLES = {
    **dict.fromkeys(CONFIG_KEYS, f"the config map {CONFIG_MAP}"),
    **dict.fromkeys(CREDENTIAL_KEYS, "cluster.credentials_secret"),
    **dict.fromkeys((ATTEMPT_VARIABLE, RUN_ID_VARIABLE), "the pod"),
}
STAYS_ON_ITS_NODE = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}
"""Annotations of the pods that work for hours: an autoscaler that tidies up nodes would start their work anew."""
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


Duration = Annotated[str, checked(to_seconds)]


class ClusterConfig(Settings):
    """Node pool, resources, limits and access of the tasks. Quantities are Kubernetes', times are such as 12h."""

    gpu_resource: str = "nvidia.com/gpu"
    """What the device plugin calls a GPU; empty: there are none, and all tasks run on CPUs (kind)."""
    gpu_hour_price: float = Field(default=0.0, ge=0)
    """Of one GPU for an hour, in any currency: the report then tells what a run cost. 0: it does not."""
    gpu_node_selector: Labels = Field(default={})
    """Labels of the nodes for tasks that compute on GPUs, and for training."""
    gpu_tolerations: Tolerations = Field(default=[])
    """Taints of these nodes."""
    cpu_node_selector: Labels = Field(default={})
    """Labels of the nodes for all other tasks."""
    cpu_tolerations: Tolerations = Field(default=[])
    """Taints of these nodes."""
    gpu_task_cpu: Quantity = "8"
    """Request of a task that generates, scores or evaluates."""
    gpu_task_memory: Quantity = "80Gi"
    """Request and limit of such a task."""
    gpu_task_shm_size: OptionalQuantity = "16Gi"
    """/dev/shm of a task with GPUs: memory of its own, counted in its memory limit. Empty: the 64 MiB of Kubernetes."""
    cpu_task_cpu: Quantity = "2"
    """Request of any other task."""
    cpu_task_memory: Quantity = "16Gi"
    """Request and limit of any other task."""
    import_memory: Quantity = "32Gi"
    """Request and limit of import-model, which reads every tensor once."""
    launcher_cpu: Quantity = "500m"
    """Request of the task that starts the training pods and waits for them."""
    launcher_memory: Quantity = "2Gi"
    """Request and limit of that task."""
    trainer_cpu: Quantity = "80"
    """Request of one training pod; it has launch.processes_per_node GPUs."""
    trainer_memory: Quantity = "400Gi"
    """Request and limit of one training pod. Where it is not given, training.deepspeed=zero2 makes it 600Gi."""
    trainer_disk: OptionalQuantity = ""
    """Request of one training pod for its node's disk (ephemeral-storage); empty: what checkpoints, the finished model
    and, without a cache, the policy take, by the number of parameters."""
    trainer_shm_size: OptionalQuantity = "64Gi"
    """/dev/shm of one training pod: memory of its own, counted in its memory limit. Empty: the 64 MiB of Kubernetes."""
    trainer_extra_resources: Resources = Field(default={})
    """More of what a node offers, a number for each name, such as {"vpc.amazonaws.com/efa": "4"},
    {"rdma/rdma_shared_device_a": "1"} or {"hugepages-2Mi": "5Gi"}. Requests and limits of one training pod."""
    trainer_capabilities: Capabilities = ()
    """Linux capabilities of the training pods, such as IPC_LOCK, with which RDMA locks its memory. Pod Security
    `restricted` refuses them."""
    trainer_volumes: Volumes = Field(default=[])
    """More volumes of the training pods: name, mount_path, and source as Kubernetes writes it."""
    trainer_scratch_volume: VolumeSource = Field(default={})
    """What the training pods write checkpoints on, such as {"hostPath": {"path": "/mnt/k8s-disks/0/dice"}} for a node's
    NVMe disks, or a generic ephemeral volume. Empty: the disk that the node's kubelet uses."""
    trainer_service_account: str = "dice-trainer"
    """Of the training pods: they need S3 and no right on the Kubernetes API. Empty: the namespace's default account."""
    trainer_priority_class: str = ""
    """Of the training pods; empty: the cluster's default. Those of a TrainJob have their TrainingRuntime's."""
    training_runtime: str = Field(default="dice-torch", min_length=1)
    """TrainingRuntime of the namespace for launch.backend=trainjob: the suite's, or one that was made from it."""
    queue_name: str = ""
    """Kueue's LocalQueue for training jobs, each of which is created suspended and starts when Kueue admits it, and for
    tasks with GPUs, whose pods wait where Kueue manages pods. Empty: none."""
    clean_pod_policy: Literal["Running", "All", "None"] = "Running"
    """Which training pods the operator deletes when their job ends. A TrainJob's that have ended stay."""
    job_ttl: Duration = "1d"
    """A training job that has ended stays for so long; its pods' logs can be read meanwhile. A TrainJob stays as long
    as its run's workflow."""
    cpu_task_timeout: Duration = "6h"
    """Longest attempt of a task without a timeout of its own."""
    generate_timeout: Duration = "12h"
    """Longest generation of a shard. The task that also scores it may take this and score_timeout together."""
    score_timeout: Duration = "6h"
    """Longest scoring of a shard."""
    train_timeout: Duration = "24h"
    """Longest training. Of pods of its own, the time counts in which all of them run."""
    evaluate_timeout: Duration = "3h"
    """Longest attempt of a task that evaluates."""
    pending_timeout: Duration = "3d"
    """Time that training pods may wait for nodes, each time that one has to start. KFP sets no limit to a task that no
    node can take (make status says why it waits); the time in which tasks are retried is that much longer, for waiting
    counts in it.
    """
    queue_timeout: Duration = "30d"
    """Time that a training job may wait in Kueue's queue (queue_name): the task that follows it may take that
    much longer than train_timeout and pending_timeout. Without a queue it ends by itself long before."""
    credentials_secret: str = ""
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; empty: the service account has the rights (IRSA)."""
    env: dict[str, str] = Field(default={})
    """Environment variables of every pod, such as HF_ENDPOINT, HTTPS_PROXY, AWS_CA_BUNDLE or NCCL_SOCKET_IFNAME. No
    credentials: whoever sees the pipeline reads them."""
    env_secret: str = ""
    """Secret whose keys become variables of every task. Not of training pods: these read from S3 alone."""
    env_secret_keys: Names = ("HF_TOKEN",)
    """Of that secret; each is the variable of its name."""
    tracking_secret: str = ""
    """Secret whose keys become variables of every task and of the training pods: what trackers ask for. Empty: none."""
    tracking_secret_keys: Names = ("MLFLOW_TRACKING_TOKEN",)
    """Of that secret; each is the variable of its name, such as MLFLOW_TRACKING_PASSWORD or WANDB_API_KEY."""
    image_pull_secrets: Names = ()
    """Secrets to pull images with."""
    model_cache_claim: str = "dice-model-cache"
    """Volume claim that keeps fetched models for all tasks; empty: each task downloads its own."""
    scratch_size: OptionalQuantity = ""
    """Limit of a task's temporary files, on the disk of its node; empty: none."""
    run_as_user: Int = Field(default=10001, ge=0)
    """Of the images' files. 0 leaves the choice to the cluster (OpenShift); root is refused either way."""
    labels: Labels = Field(default={})
    """More labels of every pod, such as a cost centre."""
    annotations: Annotations = Field(default={})
    """More annotations of every pod."""

    @model_validator(mode="after")
    def _memory_holds_shm(self) -> Self:
        for kind in ("gpu_task", "trainer"):
            shm, memory = getattr(self, f"{kind}_shm_size"), getattr(self, f"{kind}_memory")
            if shm and quantity(shm) >= quantity(memory):
                raise ValueError(
                    f"{kind}_shm_size must be less than {kind}_memory, of which it is a part, got {shm} and {memory}"
                )
        return self

    @model_validator(mode="after")
    def _env_sets_what_nothing_else_does(self) -> Self:
        for name in (*self.env, *self.env_secret_keys, *self.tracking_secret_keys):
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"env: a variable has letters, digits and '_' in its name, got {name!r}")
            if name in _OWN_VARIABLES:
                raise ValueError(f"env: {name} comes from {_OWN_VARIABLES[name]}, set it there")
        if secret := {"HF_TOKEN", *self.env_secret_keys} & self.env.keys():
            raise ValueError(f"env: {', '.join(sorted(secret))} belongs into a secret, see env_secret")
        if secret := {*tracking.SECRETS, *self.tracking_secret_keys} & self.env.keys():
            raise ValueError(f"env: {', '.join(sorted(secret))} belongs into a secret, see tracking_secret")
        if "@" in self.env.get("MLFLOW_TRACKING_URI", ""):
            raise ValueError(
                "env: MLFLOW_TRACKING_URI holds a name or a password: set MLFLOW_TRACKING_USERNAME, and the password "
                "by tracking_secret"
            )
        return self

    @model_validator(mode="after")
    def _tracking_secret_is_of_trackers(self) -> Self:
        for name in self.tracking_secret_keys:
            if not name.startswith(tracking.PREFIXES):
                raise ValueError(
                    f"tracking_secret_keys: a tracker's variable begins with {' or '.join(tracking.PREFIXES)}, got "
                    f"{name!r}; other secrets of tasks are env_secret's"
                )
            if self.env_secret and self.tracking_secret and name in self.env_secret_keys:
                raise ValueError(f"tracking_secret_keys: {name} is among env_secret_keys too: take it out of one")
        return self

    def timeout_seconds(self, stage: Stage) -> int:
        """Return how long one attempt of a stage's task may run."""
        names = [f"{name}_timeout" for name in stage.parts or (stage.name,)]
        own = [name for name in names if name in type(self).model_fields] or ["cpu_task_timeout"]
        return sum(to_seconds(getattr(self, name)) for name in own)

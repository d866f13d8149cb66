"""Where the tasks of a preset run on a cluster, and with what: section `cluster` of a preset.

Fixed when a pipeline is compiled, so that none of it is a parameter of a run. resources.py puts it on the tasks, and
hands what training needs on to its pods; preflight.py looks whether the cluster has it.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dice_core.settings.base import Int, Settings
from dice_core.settings.durations import to_seconds
from dice_core.settings.quantities import (
    Annotations,
    Labels,
    OptionalQuantity,
    Quantity,
    Tolerations,
    checked,
    quantity,
)
from dice_core.stages.table import Stage

PIPELINE_ACCOUNT, TRAINER_ACCOUNT = "dice-pipeline", "dice-trainer"
CONFIG_MAP, CONFIG_KEYS = "dice-config", ("AWS_ENDPOINT_URL", "AWS_REGION")
CREDENTIAL_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
POD_FIELDS = {
    # The launcher of training asks for its own pod, whose owner becomes the owner of the job.
    "POD_NAME": "metadata.name",
    "POD_NAMESPACE": "metadata.namespace",
    # Of a recurring run, which is named by it (stages.choose_inputs).
    "KFP_RUN_ID": "metadata.labels['pipeline/runid']",
}
"""What a task is told of its own pod, by variable."""
_OWN_VARIABLES = {
    **dict.fromkeys(CONFIG_KEYS, f"the config map {CONFIG_MAP}"),
    **dict.fromkeys(CREDENTIAL_KEYS, "cluster.credentials_secret"),
    **dict.fromkeys(POD_FIELDS, "the pod"),
}
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Duration = Annotated[str, checked(to_seconds)]
Names = Annotated[tuple[str, ...], BeforeValidator(_tuple)]


class ClusterConfig(Settings):
    """Node pool, resources, limits and access of the tasks. Quantities are Kubernetes', times are such as 12h."""

    gpu_resource: str = "nvidia.com/gpu"
    """What the device plugin calls a GPU; empty: there are none, and all tasks run on CPUs (kind)."""
    gpus_per_task: Int = Field(default=1, ge=1)
    """Of a task that generates, scores or evaluates: each of these loads one copy of the models."""
    gpu_node_selector: Labels = Field(default={})
    gpu_tolerations: Tolerations = Field(default=[])
    cpu_node_selector: Labels = Field(default={})
    cpu_tolerations: Tolerations = Field(default=[])
    gpu_task_cpu: Quantity = "8"
    gpu_task_memory: Quantity = "96Gi"
    gpu_task_shm_size: OptionalQuantity = "16Gi"
    """/dev/shm of a task with GPUs: memory of its own, counted in its memory limit. Empty: the 64 MiB of Kubernetes."""
    cpu_task_cpu: Quantity = "2"
    cpu_task_memory: Quantity = "16Gi"
    import_memory: Quantity = "32Gi"
    """import-model reads every tensor once."""
    launcher_cpu: Quantity = "500m"
    launcher_memory: Quantity = "2Gi"
    """Of the task that starts the training pods and waits for them."""
    trainer_cpu: Quantity = "80"
    """Of one training pod; it has launch.processes_per_node GPUs."""
    trainer_memory: Quantity = "900Gi"
    trainer_shm_size: OptionalQuantity = "64Gi"
    training_backend: Literal["pytorchjob", "torchrun"] = "pytorchjob"
    """torchrun trains in the pod of the task itself, where there is no training operator: one node only."""
    cpu_task_timeout: Duration = "6h"
    generate_timeout: Duration = "12h"
    score_timeout: Duration = "6h"
    train_timeout: Duration = "24h"
    """Of training in pods of its own: counted while all of them run."""
    evaluate_timeout: Duration = "3h"
    pending_timeout: Duration = "3d"
    """Time that training pods may wait for nodes, each time that one has to start. KFP sets no limit to a task that no
    node can take (make status says why it waits); the time in which tasks are retried is that much longer, for waiting
    counts in it.
    """
    queue_timeout: Duration = "30d"
    """Time that a training job may wait in Kueue's queue (launch.queue_name): the task that follows it may take that
    much longer than train_timeout and pending_timeout. Without a queue it ends by itself long before."""
    credentials_secret: str = ""
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; empty: the service account has the rights (IRSA)."""
    env: dict[str, str] = Field(default={})
    """Environment variables of every pod, such as HF_ENDPOINT, HTTPS_PROXY or AWS_CA_BUNDLE. No credentials: whoever
    sees the pipeline reads them."""
    env_secret: str = ""
    """Secret whose keys become variables of every task. Not of training pods: these read from S3 alone."""
    env_secret_keys: Names = ("HF_TOKEN",)
    """Of that secret; each is the variable of its name."""
    image_pull_secrets: Names = ()
    model_cache_claim: str = "dice-model-cache"
    """Volume claim that keeps fetched models for all tasks; empty: each task downloads its own."""
    scratch_size: OptionalQuantity = ""
    """Limit of a task's temporary files, on the disk of its node; empty: none."""
    run_as_user: Int = Field(default=10001, ge=0)
    """Of the images' files. 0 leaves the choice to the cluster (OpenShift); root is refused either way."""
    labels: Labels = Field(default={})
    """More labels of every pod, such as a cost centre."""
    annotations: Annotations = Field(default={})

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
        for name in (*self.env, *self.env_secret_keys):
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"env: a variable has letters, digits and '_' in its name, got {name!r}")
            if name in _OWN_VARIABLES:
                raise ValueError(f"env: {name} comes from {_OWN_VARIABLES[name]}, set it there")
        if secret := {"HF_TOKEN", *self.env_secret_keys} & self.env.keys():
            raise ValueError(f"env: {', '.join(sorted(secret))} belongs into a secret, see env_secret")
        return self

    def timeout_seconds(self, stage: Stage) -> int:
        """Return how long one attempt of a stage's task may run."""
        name = f"{stage.name}_timeout"
        return to_seconds(getattr(self, name if name in type(self).model_fields else "cpu_task_timeout"))


def a100() -> ClusterConfig:
    """Return a pool of nodes with 8 A100 of 40 GiB, as manifests/overlays/a100 expects it."""
    return ClusterConfig(
        gpu_node_selector={"node.kubernetes.io/instance-type": "p4d.24xlarge"},
        gpu_tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        # An eighth of a node of 96 CPUs and 1152 GiB, less what the node keeps for itself.
        gpu_task_cpu="10",
        gpu_task_memory="120Gi",
        trainer_cpu="80",
        trainer_memory="900Gi",
    )


def kind() -> ClusterConfig:
    """Return one machine without a GPU, as manifests/overlays/kind makes it."""
    return ClusterConfig(
        gpu_resource="",
        gpu_task_cpu="1",
        gpu_task_memory="6Gi",
        gpu_task_shm_size="1Gi",
        cpu_task_cpu="500m",
        cpu_task_memory="3Gi",
        import_memory="4Gi",
        trainer_cpu="1",
        trainer_memory="6Gi",
        trainer_shm_size="1Gi",
        pending_timeout="30m",  # no node will come: what waits for longer lacks its image or memory
        credentials_secret="dice-s3",
    )

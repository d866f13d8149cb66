"""Where the tasks of a preset run on a cluster, and with what: section `cluster` of a preset.

Fixed when a pipeline is compiled, so that none of it is a parameter of a run. resources.py puts it on the tasks, and
hands what training needs on to its pods; preflight.py looks whether the cluster has it.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from dice_core.config import Int, Settings
from pipelines.durations import to_seconds

Stage = Literal[
    "check-settings",
    "choose-inputs",
    "import-model",
    "prepare-data",
    "generate",
    "score",
    "pair",
    "train",
    "evaluate",
    "report",
]
GPU_STAGES = ("generate", "score", "evaluate")
"""Hold GPUs in their own pods. The pod of train starts others and waits: it holds none."""

PIPELINE_ACCOUNT, TRAINER_ACCOUNT = "dice-pipeline", "dice-trainer"
CONFIG_MAP, CONFIG_KEYS = "dice-config", ("AWS_ENDPOINT_URL", "AWS_REGION")
CREDENTIAL_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_FACTORS = {"m": 1e-3, None: 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_FACTORS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_TOLERATION_KEYS = {"key", "operator", "value", "effect"}


def quantity(text: str) -> float:
    """Return the number behind a Kubernetes quantity: `16Gi` in bytes, `500m` in CPUs.

    Raises:
        ValueError: not a quantity.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"must be a Kubernetes quantity such as 8, 500m or 64Gi, got {text!r}")
    return float(match[1]) * _FACTORS[match[2]]


def _checked(check: Callable[[str], float], *, may_be_empty: bool = False) -> BeforeValidator:
    """Return a validator that keeps the text if the check takes it; a bare number of a command line becomes text."""

    def validate(value: Any) -> Any:
        value = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        if isinstance(value, str) and (value or not may_be_empty):
            try:
                check(value)
            except ValueError as error:
                raise PydanticCustomError("cluster", "{reason}", {"reason": str(error).partition(", got")[0]}) from None
        return value

    return BeforeValidator(validate)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Quantity = Annotated[str, _checked(quantity)]
OptionalQuantity = Annotated[str, _checked(quantity, may_be_empty=True)]
Duration = Annotated[str, _checked(to_seconds)]
Names = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
Tolerations = Annotated[tuple[dict[str, str], ...], BeforeValidator(_tuple)]


class ClusterConfig(Settings):
    """Node pool, resources, limits and access of the tasks. Quantities are Kubernetes', times are such as 12h."""

    gpu_resource: str = "nvidia.com/gpu"
    """What the device plugin calls a GPU; empty: there are none, and all tasks run on CPUs (kind)."""
    gpus_per_task: Int = Field(default=1, ge=1)
    """Of a task that generates, scores or evaluates: each of these loads one copy of the models."""
    gpu_node_selector: dict[str, str] = Field(default={})
    gpu_tolerations: Tolerations = ()
    cpu_node_selector: dict[str, str] = Field(default={})
    cpu_tolerations: Tolerations = ()
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
    evaluate_timeout: Duration = "3h"
    pending_timeout: Duration = "3d"
    """Time that pods may wait for nodes: of the tasks, all attempts together, for retries go on that much longer; of the
    training pods, each attempt."""
    credentials_secret: str = ""
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; empty: the service account has the rights (IRSA)."""
    image_pull_secrets: Names = ()
    model_cache_claim: str = "dice-model-cache"
    """Volume claim that keeps fetched models for all tasks; empty: each task downloads its own."""
    scratch_size: OptionalQuantity = ""
    """Limit of a task's temporary files, on the disk of its node; empty: none."""
    run_as_user: Int = Field(default=10001, ge=0)
    """Of the images' files. 0 leaves the choice to the cluster (OpenShift); root is refused either way."""
    labels: dict[str, str] = Field(default={})
    """More labels of every pod, such as a cost centre."""
    annotations: dict[str, str] = Field(default={})

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
    def _tolerations_have_the_keys_of_kubernetes(self) -> Self:
        for toleration in (*self.gpu_tolerations, *self.cpu_tolerations):
            if unknown := set(toleration) - _TOLERATION_KEYS:
                raise ValueError(
                    f"a toleration has the keys {', '.join(sorted(_TOLERATION_KEYS))}, got {', '.join(sorted(unknown))}"
                )
        return self

    def timeout_seconds(self, stage: Stage) -> int:
        """Return how long one attempt of a stage's task may run."""
        name = f"{stage}_timeout"
        return to_seconds(getattr(self, name if name in type(self).model_fields else "cpu_task_timeout"))


def a100() -> ClusterConfig:
    """Return a pool of nodes with 8 A100 of 40 GiB, as manifests/overlays/a100 expects it."""
    return ClusterConfig(
        gpu_node_selector={"node.kubernetes.io/instance-type": "p4d.24xlarge"},
        gpu_tolerations=({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},),
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

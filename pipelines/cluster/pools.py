"""The kinds of nodes that presets run on, by name: what a node has, and the section `cluster` that follows from it.

`make submit SET="pool=p5"` takes another one; a setting of section `cluster` still wins. The figures are those of the
cloud's documentation, less what a node keeps for itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.cluster.config import ClusterConfig

INSTANCE_TYPE = "node.kubernetes.io/instance-type"
"""The label that every cloud's nodes have."""
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}

TRAINER_MEMORY = "400Gi"
"""Of a training pod of 8 processes with ZeRO-3: each reads its share of the weights and keeps what it copies to storage
(12 bytes a parameter, 96 GB for 8 billion)."""
TRAINER_MEMORY_ZERO2 = "600Gi"
"""With ZeRO-2 each process has the whole model in memory before it goes to its GPU."""


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """A kind of node with 8 GPUs."""

    instance_type: str
    gpu: str
    """What people call the GPU."""
    gpu_memory_gib: int
    num_cpus: int
    """Of the node."""
    memory_gib: int
    """Of the node."""

    def cluster(self) -> ClusterConfig:
        """Return where tasks run, and with what: an eighth of a node's CPUs for a task with one GPU."""
        kept_cpus = 16
        return ClusterConfig(
            gpu_node_selector={INSTANCE_TYPE: self.instance_type},
            gpu_tolerations=[GPU_TAINT],
            gpu_task_cpu=str((self.num_cpus - kept_cpus) // 8),
            # The weights of 8 billion parameters on their way to the GPU twice, and shared memory.
            gpu_task_memory="80Gi",
            trainer_cpu=str(self.num_cpus - kept_cpus),
            trainer_memory=TRAINER_MEMORY,
        )


NODE_KINDS = {
    "p4d": NodeKind(instance_type="p4d.24xlarge", gpu="A100", gpu_memory_gib=40, num_cpus=96, memory_gib=1152),
    "p4de": NodeKind(instance_type="p4de.24xlarge", gpu="A100", gpu_memory_gib=80, num_cpus=96, memory_gib=1152),
    "a2-ultragpu": NodeKind(
        instance_type="a2-ultragpu-8g", gpu="A100", gpu_memory_gib=80, num_cpus=96, memory_gib=1360
    ),
    "p5": NodeKind(instance_type="p5.48xlarge", gpu="H100", gpu_memory_gib=80, num_cpus=192, memory_gib=2048),
}
"""Nodes with 8 GPUs: AWS's p4d, p4de and p5, and Google's a2-ultragpu."""


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


POOLS: dict[str, Callable[[], ClusterConfig]] = {
    **{name: node.cluster for name, node in NODE_KINDS.items()},
    "kind": kind,
}
"""What setting `pool` of a preset may name."""

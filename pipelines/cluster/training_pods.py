"""The pods that train, derived as a whole from section `cluster`. A preset has no section for them."""

from components import images
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.settings.durations import to_seconds
from pipelines.cluster.config import STAYS_ON_ITS_NODE, ClusterConfig

OWNERS = {
    "service_account": "trainer_service_account",
    "gpu_resource": "gpu_resource",
    "cpu": "trainer_cpu",
    "memory": "trainer_memory",
    "disk": "trainer_disk",
    "shm_size": "trainer_shm_size",
    "extra_resources": "trainer_extra_resources",
    "capabilities": "trainer_capabilities",
    "volumes": "trainer_volumes",
    "scratch_volume": "trainer_scratch_volume",
    "model_cache_claim": "model_cache_claim",
    "run_as_user": "run_as_user",
    "env": "env",
    "labels": "labels",
    "annotations": "annotations",
    "credentials_secret": "credentials_secret",
    "tracking_secret": "tracking_secret",
    "tracking_secret_keys": "tracking_secret_keys",
    "image_pull_secrets": "image_pull_secrets",
    "node_selector": "gpu_node_selector",
    "tolerations": "gpu_tolerations",
    "training_runtime": "training_runtime",
    "queue_name": "queue_name",
    "priority_class": "trainer_priority_class",
    "pending_deadline_seconds": "pending_timeout",
    "active_deadline_seconds": "train_timeout",
    "ttl_seconds_after_finished": "job_ttl",
    "clean_pod_policy": "clean_pod_policy",
}
"""Each setting of the training pods but their image (components.images), and the one of the cluster that decides it."""


def training_pods(launch: LaunchConfig, cluster: ClusterConfig | None) -> PodConfig | None:
    """Return what the training pods look like; None where the task of the stage trains itself."""
    if cluster is None or launch.backend == "torchrun":
        return None
    values = {name: getattr(cluster, owner) for name, owner in OWNERS.items()}
    seconds = {name: to_seconds(value) for name, value in values.items() if "_seconds" in name}
    values["annotations"] = {**STAYS_ON_ITS_NODE, **cluster.annotations}
    return PodConfig.parse({"image": images.TRAIN, **values, **seconds}, "pods")

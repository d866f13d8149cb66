"""What every task of a compiled pipeline carries beside its work: its name in the UI, retries, and its place.

The one place that configures tasks. Without `cluster` (a run on this machine) a task gets its name and retries alone.
"""

from typing import Any

from kfp import dsl, kubernetes

from components import images
from dice_core.launch.settings import LaunchConfig
from dice_core.settings.durations import to_seconds
from dice_core.stages.table import TRAIN, Stage
from pipelines.cluster.config import (
    CONFIG_KEYS,
    CONFIG_MAP,
    CREDENTIAL_KEYS,
    POD_FIELDS,
    TRAINER_ACCOUNT,
    ClusterConfig,
)
from pipelines.presets import Preset

PART_OF = {"app.kubernetes.io/part-of": "dice-suite"}
"""Network policies select the suite's pods by it."""
CACHE_FOLDER = "/cache"
"""The images keep models in /cache/models (DICE_CACHE)."""
_BACKOFF_SECONDS = 60
_NO_SIDECAR = "sidecar.istio.io/inject"


def configure_task(task: dsl.PipelineTask, stage: Stage, display_name: str, preset: Preset) -> dsl.PipelineTask:
    """Give a task its display name, retries, no cache, and what it needs on a cluster.

    KFP's cache stays off: a cached success whose data in S3 is gone is worse than a rerun, and a stage whose manifest
    is there returns at once anyway.

    Args:
        task: of a stage.
        stage: its row of the table.
        display_name: what the UI shows.
        preset: decides retries (each continues where the last one stopped) and, by its cluster section, the rest.
    """
    task.set_display_name(display_name)
    task.set_caching_options(enable_caching=False)
    if preset.num_retries:
        task.set_retry(
            preset.num_retries,
            backoff_duration=f"{_BACKOFF_SECONDS}s",
            backoff_factor=2.0,
            backoff_max_duration=f"{retry_window_seconds(preset, stage)}s",
        )
    if preset.cluster:
        _place(task, stage, preset, preset.cluster)
        _give_access(task, preset.cluster)
        _mount(task, stage, preset.cluster)
        _mark(task, stage, preset.cluster)
    return task


def retry_window_seconds(preset: Preset, stage: Stage) -> int:
    """Return for how long after its first start a task is retried: longer than all its attempts can take.

    KFP counts from the start of the first attempt and stops at one hour by default; a pod that runs when the window
    ends is killed. Time in which pods wait for nodes counts too.
    """
    attempts = preset.num_retries + 1
    # Each pause is twice the one before.
    backoff = _BACKOFF_SECONDS * ((1 << preset.num_retries) - 1)
    cluster = preset.cluster or ClusterConfig()
    return attempts * task_timeout_seconds(preset, stage) + backoff + to_seconds(cluster.pending_timeout)


def task_timeout_seconds(preset: Preset, stage: Stage) -> int:
    """Return how long one attempt of a task's pod may run.

    The pod of train waits for others: it outlives every deadline of the training job, and says which has passed.
    """
    cluster = preset.cluster or ClusterConfig()
    if stage == TRAIN and _trains_elsewhere(cluster):
        launch = launch_on_cluster(preset)
        of_job = launch.pending_deadline_seconds + launch.active_deadline_seconds
        return to_seconds(cluster.queue_timeout) + of_job
    return cluster.timeout_seconds(stage)


def launch_on_cluster(preset: Preset) -> LaunchConfig:
    """Return the launch settings of a preset with what its cluster section says of the pool, the pods and access.

    A launch setting that differs from the default of its class was chosen: it stays. Variables, labels and annotations
    of both are taken together.
    """
    launch, cluster = preset.launch, preset.cluster
    if cluster is None or not _trains_elsewhere(cluster):
        return launch
    values: dict[str, Any] = {
        "backend": "pytorchjob",
        "image": images.TRAIN,
        "service_account": TRAINER_ACCOUNT,
        "gpu_resource": cluster.gpu_resource,
        "cpu": cluster.trainer_cpu,
        "memory": cluster.trainer_memory,
        "shm_size": cluster.trainer_shm_size,
        "node_selector": cluster.gpu_node_selector,
        "tolerations": cluster.gpu_tolerations,
        "credentials_secret": cluster.credentials_secret,
        "image_pull_secrets": list(cluster.image_pull_secrets),
        "model_cache_claim": cluster.model_cache_claim,
        "pending_deadline_seconds": to_seconds(cluster.pending_timeout),
        "active_deadline_seconds": cluster.timeout_seconds(TRAIN),
        "run_as_user": cluster.run_as_user,
    }
    defaults = LaunchConfig()
    left = {name: value for name, value in values.items() if getattr(launch, name) == getattr(defaults, name)}
    both = {name: getattr(cluster, name) | getattr(launch, name) for name in ("env", "labels", "annotations")}
    return LaunchConfig.parse(launch.to_dict() | left | both, "launch")


def _trains_elsewhere(cluster: ClusterConfig) -> bool:
    return cluster.training_backend == "pytorchjob"


def _is_trainer(stage: Stage, cluster: ClusterConfig) -> bool:
    return stage == TRAIN and not _trains_elsewhere(cluster)


def _place(task: dsl.PipelineTask, stage: Stage, preset: Preset, cluster: ClusterConfig) -> None:
    """Choose the nodes, and ask for CPUs, memory, GPUs and time."""
    is_trainer, is_launcher = _is_trainer(stage, cluster), stage == TRAIN and _trains_elsewhere(cluster)
    has_gpu = stage.pod == "gpu" or is_trainer
    kind = "trainer" if is_trainer else "launcher" if is_launcher else "gpu_task" if has_gpu else "cpu_task"
    memory = cluster.import_memory if stage.pod == "import" else getattr(cluster, f"{kind}_memory")
    # A limit of CPUs would only slow a task down; one of memory protects the other pods of the node.
    task.set_cpu_request(getattr(cluster, f"{kind}_cpu")).set_memory_request(memory).set_memory_limit(memory)
    if has_gpu and cluster.gpu_resource:
        task.set_accelerator_type(cluster.gpu_resource)
        task.set_accelerator_limit(preset.launch.processes_per_node if is_trainer else cluster.gpus_per_task)
    if is_launcher:
        # It starts pods and reads their logs: the image with vLLM or CUDA in it would be pulled for nothing.
        task.set_container_image(images.CORE)
    selector, tolerations = (
        (cluster.gpu_node_selector, cluster.gpu_tolerations)
        if has_gpu
        else (cluster.cpu_node_selector, cluster.cpu_tolerations)
    )
    for name, value in selector.items():
        kubernetes.add_node_selector(task, name, value)
    for toleration in tolerations:
        # kfp's add_toleration_json would drop the seconds.
        seconds = toleration.get("tolerationSeconds")
        others = {name: value for name, value in toleration.items() if name != "tolerationSeconds"}
        kubernetes.add_toleration(task, **others, toleration_seconds=seconds)
    kubernetes.set_timeout(task, task_timeout_seconds(preset, stage))


def _give_access(task: dsl.PipelineTask, cluster: ClusterConfig) -> None:
    """Say where S3 and all else outside is, and who the pod is; run as nobody special."""
    kubernetes.use_config_map_as_env(task, CONFIG_MAP, {name: name for name in CONFIG_KEYS})
    if cluster.credentials_secret:
        kubernetes.use_secret_as_env(task, cluster.credentials_secret, {name: name for name in CREDENTIAL_KEYS})
    for name, value in cluster.env.items():
        task.set_env_variable(name, value)
    if cluster.env_secret:
        kubernetes.use_secret_as_env(task, cluster.env_secret, {name: name for name in cluster.env_secret_keys})
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    kubernetes.set_security_context(task, run_as_user=cluster.run_as_user or None, run_as_non_root=True)


def _mount(task: dsl.PipelineTask, stage: Stage, cluster: ClusterConfig) -> None:
    """Mount shared memory, the models' cache and room for temporary files."""
    is_trainer = _is_trainer(stage, cluster)
    has_models = stage.pod == "gpu" or is_trainer
    shm_size = cluster.trainer_shm_size if is_trainer else cluster.gpu_task_shm_size
    if shm_size and has_models:
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", "Memory", shm_size)
    kubernetes.empty_dir_mount(task, "scratch", "/tmp", size_limit=cluster.scratch_size or None)
    # What an import has downloaded from the Hub lies there too, where a retried pod finds it.
    if cluster.model_cache_claim and (has_models or stage.pod == "import"):
        kubernetes.mount_pvc(task, cluster.model_cache_claim, CACHE_FOLDER)
    else:
        kubernetes.empty_dir_mount(task, "cache", CACHE_FOLDER)


def _mark(task: dsl.PipelineTask, stage: Stage, cluster: ClusterConfig) -> None:
    """Label the pod for network policies and people, and tell it its own name."""
    labels = {**cluster.labels, **PART_OF, "app.kubernetes.io/component": stage.name, _NO_SIDECAR: "false"}
    for name, value in labels.items():
        kubernetes.add_pod_label(task, name, value)
    # Older Istio reads the annotation, newer the label.
    for name, value in {_NO_SIDECAR: "false", **cluster.annotations}.items():
        kubernetes.add_pod_annotation(task, name, value)
    for name, path in POD_FIELDS.items():
        kubernetes.use_field_path_as_env(task, name, path)

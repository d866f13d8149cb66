"""What every task of a compiled pipeline carries beside its work: its name in the UI, retries, and its place.

The one place that configures tasks. Without `cluster` (a run on this machine) a task gets its name and retries alone.
"""

from typing import Literal

from kfp import dsl, kubernetes

from components import images
from dice_core.accelerator import GPU_VARIABLE
from dice_core.launch.job_kinds import JOB_KINDS
from dice_core.launch.job_spec import QUEUE_LABEL
from dice_core.launch.settings import LaunchConfig
from dice_core.settings.durations import to_seconds
from dice_core.stages.table import CHECK_SETTINGS, CHOOSE_INPUTS, REPORT, Stage
from pipelines.cluster.config import (
    ATTEMPT_FIELD,
    ATTEMPT_VARIABLE,
    CONFIG_KEYS,
    CONFIG_MAP,
    CREDENTIAL_KEYS,
    RUN_ID_FIELD,
    RUN_ID_VARIABLE,
    STAYS_ON_ITS_NODE,
    ClusterConfig,
)
from pipelines.presets import Preset

PART_OF = {"app.kubernetes.io/part-of": "dice-suite"}
"""Network policies select the suite's pods by it."""
CACHE_FOLDER = "/cache"
"""The images keep models in /cache/models (DICE_CACHE)."""
Role = Literal["cpu_task", "gpu_task", "launcher", "trainer"]
"""What a pod is; the settings of its size in section `cluster` begin with it."""
_WITH_GPU = ("gpu_task", "trainer")
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
        window = retry_window_seconds(preset, preset.cluster, stage) if preset.cluster else None
        task.set_retry(
            preset.num_retries,
            backoff_duration=f"{_BACKOFF_SECONDS}s",
            backoff_factor=2.0,
            backoff_max_duration=f"{window}s" if window else None,
        )
    if preset.cluster:
        role = _role(stage, preset.launch)
        _place(task, stage, role, preset, preset.cluster)
        _give_access(task, preset.cluster)
        _mount(task, stage, role, preset.cluster)
        _mark(task, stage, role, preset.cluster)
    return task


def retry_window_seconds(preset: Preset, cluster: ClusterConfig, stage: Stage) -> int:
    """Return for how long after its first start a task is retried: longer than all its attempts can take.

    KFP counts from the start of the first attempt and stops at one hour by default; a pod that runs when the window
    ends is killed. Time in which pods wait for nodes counts too.
    """
    attempts = preset.num_retries + 1
    # Each pause is twice the one before.
    backoff = _BACKOFF_SECONDS * ((1 << preset.num_retries) - 1)
    role = _role(stage, preset.launch)
    # The launcher's own timeout has its job's time in the queue.
    queued = to_seconds(cluster.queue_timeout) if cluster.queue_name and role in _WITH_GPU else 0
    waiting = to_seconds(cluster.pending_timeout) + queued
    return attempts * task_timeout_seconds(cluster, stage, role) + backoff + waiting


def task_timeout_seconds(cluster: ClusterConfig, stage: Stage, role: Role) -> int:
    """Return how long one attempt of a task's pod may run.

    The launcher waits for other pods: it outlives every deadline of the training job, and says which has passed.
    """
    seconds = cluster.timeout_seconds(stage)
    if role == "launcher":
        seconds += to_seconds(cluster.queue_timeout) + to_seconds(cluster.pending_timeout)
    return seconds


def _role(stage: Stage, launch: LaunchConfig) -> Role:
    if stage.pod == "train":
        return "launcher" if launch.backend in JOB_KINDS else "trainer"
    return "gpu_task" if stage.pod == "gpu" else "cpu_task"


def _place(task: dsl.PipelineTask, stage: Stage, role: Role, preset: Preset, cluster: ClusterConfig) -> None:
    """Choose the nodes, and ask for CPUs, memory, GPUs and time."""
    has_gpu = role in _WITH_GPU
    memory = cluster.import_memory if stage.pod == "import" else getattr(cluster, f"{role}_memory")
    # A limit of CPUs would only slow a task down; one of memory protects the other pods of the node.
    task.set_cpu_request(getattr(cluster, f"{role}_cpu")).set_memory_request(memory).set_memory_limit(memory)
    if has_gpu and cluster.gpu_resource:
        task.set_accelerator_type(cluster.gpu_resource)
        # A stage that then sees none ends, and does not compute on the CPU.
        task.set_env_variable(GPU_VARIABLE, "1")
        task.set_accelerator_limit(preset.launch.processes_per_node if role == "trainer" else preset.gpus_of(stage))
    if role == "launcher":
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
    kubernetes.set_timeout(task, task_timeout_seconds(cluster, stage, role))


def _give_access(task: dsl.PipelineTask, cluster: ClusterConfig) -> None:
    """Say where S3 and all else outside is, and who the pod is; run as nobody special."""
    kubernetes.use_config_map_as_env(task, CONFIG_MAP, {name: name for name in CONFIG_KEYS})
    if cluster.credentials_secret:
        kubernetes.use_secret_as_env(task, cluster.credentials_secret, {name: name for name in CREDENTIAL_KEYS})
    for name, value in cluster.env.items():
        task.set_env_variable(name, value)
    if cluster.env_secret:
        kubernetes.use_secret_as_env(task, cluster.env_secret, {name: name for name in cluster.env_secret_keys})
    if cluster.tracking_secret:
        keys = {name: name for name in cluster.tracking_secret_keys}
        kubernetes.use_secret_as_env(task, cluster.tracking_secret, keys)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    user = cluster.run_as_user or None
    kubernetes.set_security_context(task, run_as_user=user, run_as_group=user, run_as_non_root=True)


def _mount(task: dsl.PipelineTask, stage: Stage, role: Role, cluster: ClusterConfig) -> None:
    """Mount shared memory, the models' cache and room for temporary files."""
    has_models = role in _WITH_GPU
    if has_models and (shm_size := getattr(cluster, f"{role}_shm_size")):
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", "Memory", shm_size)
    kubernetes.empty_dir_mount(task, "scratch", "/tmp", size_limit=cluster.scratch_size or None)
    # What an import has downloaded from the Hub lies there too, where a retried pod finds it.
    if cluster.model_cache_claim and (has_models or stage.pod == "import"):
        kubernetes.mount_pvc(task, cluster.model_cache_claim, CACHE_FOLDER)
    else:
        kubernetes.empty_dir_mount(task, "cache", CACHE_FOLDER)


def _mark(task: dsl.PipelineTask, stage: Stage, role: Role, cluster: ClusterConfig) -> None:
    """Label the pod for network policies and people; tell it which run it is of where its work follows from that."""
    # Where Kueue manages pods, such a pod waits until it is admitted; elsewhere the label says nothing.
    queue = {QUEUE_LABEL: cluster.queue_name} if cluster.queue_name and role in _WITH_GPU else {}
    labels = {**cluster.labels, **queue, **PART_OF, "app.kubernetes.io/component": stage.name, _NO_SIDECAR: "false"}
    for name, value in labels.items():
        kubernetes.add_pod_label(task, name, value)
    # Older Istio reads the annotation, newer the label.
    kept = STAYS_ON_ITS_NODE if role != "cpu_task" else {}
    for name, value in {_NO_SIDECAR: "false", **kept, **cluster.annotations}.items():
        kubernetes.add_pod_annotation(task, name, value)
    # Each field is kept with every task of the workflow, which has to fit into etcd: only who reads it gets it.
    kubernetes.use_field_path_as_env(task, ATTEMPT_VARIABLE, ATTEMPT_FIELD)
    if stage in (CHOOSE_INPUTS, CHECK_SETTINGS, REPORT):
        kubernetes.use_field_path_as_env(task, RUN_ID_VARIABLE, RUN_ID_FIELD)

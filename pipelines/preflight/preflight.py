"""`make preflight`: check that the cluster has what a run of a preset needs, before the run spends hours to find out.

Each check prints one line: ok, FAIL and what to do, or `?` if the check cannot look or cannot decide. Preflight writes
one small object to S3, deletes it again, and changes nothing else.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial

from components import images
from dice_core.launch.job_kind import JobKind
from dice_core.launch.job_kinds import JOB_KINDS
from dice_core.launch.kubernetes import ForbiddenError, KubernetesApi, KubernetesError
from dice_core.launch.settings import LaunchConfig
from dice_core.settings.base import ConfigError
from dice_core.settings.quantities import quantity
from dice_core.stages.table import EVALUATE, GENERATE_AND_SCORE
from pipelines.cluster.config import (
    CONFIG_KEYS,
    CONFIG_MAP,
    CREDENTIAL_KEYS,
    PIPELINE_ACCOUNT,
    ClusterConfig,
)
from pipelines.kfp.api import Connection, KfpApi
from pipelines.planning.make import has_pools_nodes, make_plan
from pipelines.preflight.argo import check_retries, check_ttl
from pipelines.preflight.findings import Line, UncertainError, checked
from pipelines.preflight.identity import check_identity
from pipelines.preflight.nodes import check_disk, check_driver, check_images, check_nodes, cpu_task_pods, training_pods
from pipelines.preflight.queues import check_quota, queue_lines
from pipelines.preflight.s3 import s3_lines
from pipelines.preflight.training import controller_lines
from pipelines.presets import Preset

_Rights = Sequence[tuple[str, str, str]]
_WORKFLOW_RIGHTS: _Rights = [
    # Argo's executor reports the outcome of every step by it.
    *((verb, "argoproj.io", "workflowtaskresults") for verb in ("create", "patch")),
]
_FOLLOW_RIGHTS: _Rights = [
    *((verb, "", "pods") for verb in ("get", "list")),
    ("get", "", "pods/log"),
    ("list", "", "events"),
    # A launcher told to stop asks whether its run is being stopped.
    ("get", "argoproj.io", "workflows"),
]
# Of a person. A workflow knows the states of its tasks; from 1 MiB of it on, nothing else does.
_STATUS_RIGHTS: _Rights = [("list", "argoproj.io", "workflows")]
_LOGS_RIGHTS: _Rights = [("list", "", "pods"), ("get", "", "pods/log")]
_CANCEL_RIGHTS: _Rights = [("delete", "", "pods")]
_DEPLOY = "make deploy OVERLAY=... makes it"


def preflight(options: argparse.Namespace, preset: Preset) -> int:
    """Print a line for each check, and return 1 if one failed."""
    failed = 0
    for line in lines(options, preset):
        print(line, flush=True)
        failed += line.state == "FAIL"
    if failed:
        print(f"{failed} to put right before make submit PRESET={preset.name}")
    return int(failed > 0)


def lines(options: argparse.Namespace, preset: Preset) -> Iterator[Line]:
    """Yield the result of each check."""
    connection = Connection.from_environment(options.host, options.namespace)
    yield Line("ok", "settings", preset.description)
    if preset.cluster and preset.cluster.gpu_resource:
        yield checked("GPU memory", partial(check_memory, preset))
    yield checked("Kubeflow Pipelines", partial(check_kfp, connection))
    cluster = None
    try:
        cluster = KubernetesApi(connection.namespace, context=options.context)
        version = cluster.get("/version") or {}
        yield Line("ok", "Kubernetes", f"{version.get('gitVersion', 'unknown version')} at {cluster.host}")
    except KubernetesError as error:
        yield Line("FAIL", "Kubernetes", str(error))
        cluster = None
    if cluster:
        yield from cluster_lines(cluster, preset)
    else:
        yield Line("?", "accounts, rights, training jobs, nodes", "not looked at: they need the Kubernetes API")
    yield from s3_lines(options, cluster, preset.cluster or ClusterConfig())


def check_memory(preset: Preset) -> str:
    """Say what the plan says of GPUs' and pods' memory.

    Raises:
        UncertainError: it is close, or the sizes of the model or of the GPUs are not known here.
        ConfigError: a stage cannot fit.
    """
    if not has_pools_nodes(preset):
        raise UncertainError(
            f"the nodes are not those of pool {preset.pool}: set pool= to a kind with GPUs like theirs, and make plan "
            "tells what fits"
        )
    try:
        plan = make_plan(preset, asks_hub=False)
    except ConfigError as error:
        raise UncertainError(f"{error}: make plan MODEL_CONFIG=path/to/config.json tells whether it fits") from None
    if plan.refusals:
        raise ConfigError("; ".join(plan.refusals))
    if plan.warnings:
        raise UncertainError("; ".join(plan.warnings))
    largest = max(stage.largest.memory.total for stage in plan.stages if stage.largest)
    return f"the most is {largest / 2**30:.0f} GiB of {plan.device} (make plan PRESET={preset.name} shows each stage)"


def check_kfp(connection: Connection) -> str:
    """Connect to Kubeflow Pipelines, and list runs with this person's rights."""
    api = KfpApi(connection)
    api.runs()
    return api.host + (f", several users, namespace {connection.namespace}" if api.is_multi_user else "")


def cluster_lines(cluster: KubernetesApi, preset: Preset) -> Iterator[Line]:
    """Yield the checks that need the Kubernetes API: objects, rights, who runs training jobs, retries, nodes, quota."""
    config, launch = preset.cluster or ClusterConfig(), preset.launch
    kind = JOB_KINDS.get(launch.backend)
    trainer_account = config.trainer_service_account if kind else ""
    for account in filter(None, (PIPELINE_ACCOUNT, trainer_account)):
        yield checked(f"service account {account}", partial(check_object, cluster, "serviceaccounts", account))
    yield checked(f"config map {CONFIG_MAP}", partial(check_object, cluster, "configmaps", CONFIG_MAP, CONFIG_KEYS))
    if config.credentials_secret:
        secret = partial(check_object, cluster, "secrets", config.credentials_secret, CREDENTIAL_KEYS)
        yield checked(f"secret {config.credentials_secret}", secret)
    elif config.gpu_resource:
        accounts = [*filter(None, (PIPELINE_ACCOUNT, trainer_account))]
        yield checked("rights on S3", partial(check_identity, cluster, accounts))
    if config.env_secret:
        secret = partial(check_object, cluster, "secrets", config.env_secret, config.env_secret_keys)
        yield checked(f"secret {config.env_secret}", secret)
    if config.tracking_secret:
        secret = partial(check_object, cluster, "secrets", config.tracking_secret, config.tracking_secret_keys)
        yield checked(f"secret {config.tracking_secret}", secret)
    for name in config.image_pull_secrets:
        yield checked(f"image pull secret {name}", partial(check_object, cluster, "secrets", name))
    if config.model_cache_claim:
        yield checked("model cache", partial(check_claim, cluster, config.model_cache_claim))
    if kind:
        yield from controller_lines(cluster, kind, launch, config)
    if preset.num_retries:
        yield checked("retries", partial(check_retries, cluster, preset.num_retries))
    yield checked("finished runs", partial(check_ttl, cluster))
    yield checked(f"rights of {PIPELINE_ACCOUNT}", partial(check_rights, cluster, kind))
    own_rights = [*_STATUS_RIGHTS, *_LOGS_RIGHTS, *_CANCEL_RIGHTS, *_rights_on_jobs(kind, "list", "delete")]
    yield checked("your rights", partial(check_own_rights, cluster, own_rights))
    yield checked("images", partial(check_images, cluster, [images.CORE, images.GENERATE, images.TRAIN]))
    yield checked("shared memory", partial(check_shared_memory, config, launch))
    yield checked("nodes for training", partial(check_nodes, cluster, training_pods(config, launch)))
    yield checked("nodes for CPU tasks", partial(check_nodes, cluster, cpu_task_pods(config)))
    if config.gpu_resource:
        if not config.trainer_disk and not config.trainer_scratch_volume:
            yield checked("disks for training", partial(check_disk, cluster, config))
        yield checked("GPU driver", partial(check_driver, cluster, config))
        num_shards = 0 if preset.is_offline else preset.num_shards
        of_tasks = [preset.gpus_of(stage) for stage in (GENERATE_AND_SCORE, EVALUATE)]
        yield checked("quota", partial(check_quota, cluster, config, launch, num_shards, of_tasks))
    if config.queue_name:
        yield from queue_lines(cluster, config, launch, kind)


def check_object(cluster: KubernetesApi, resource: str, name: str, keys: tuple[str, ...] = ()) -> str:
    """Check that an object of the namespace exists, with these keys in its data."""
    found = cluster.named(resource, name)
    if found is None:
        raise KubernetesError(f"there is none in namespace {cluster.namespace}: {_DEPLOY}")
    missing = [key for key in keys if key not in (found.get("data") or {})]
    if missing:
        raise KubernetesError(f"has no key {', '.join(missing)}: add it, or deploy again")
    return f"in namespace {cluster.namespace}"


def check_claim(cluster: KubernetesApi, name: str) -> str:
    """Check the volume claim. One that waits for its first pod is as good as a bound one, if its class exists."""
    found = cluster.named("persistentvolumeclaims", name)
    if found is None:
        raise KubernetesError(f"no claim {name} in namespace {cluster.namespace}: {_DEPLOY}")
    phase = found.get("status", {}).get("phase", "Pending")
    if phase == "Lost":
        raise KubernetesError(f"claim {name} has lost its volume: delete it and deploy again")
    wanted = found["spec"].get("storageClassName")
    if phase == "Pending" and wanted and cluster.get(f"/apis/storage.k8s.io/v1/storageclasses/{wanted}") is None:
        raise KubernetesError(
            f"claim {name} waits for the storage class {wanted}, which the cluster does not have: install it, or name "
            "one that it has in the overlay, delete the claim and deploy again"
        )
    modes = found["spec"].get("accessModes", ())
    if "ReadWriteMany" not in modes and len(cluster.list("/api/v1/nodes")) > 1:
        raise UncertainError(
            f"claim {name} is {', '.join(modes)}: while pods of one node mount it, those of another wait. Right only "
            "if all that mount it (imports, GPU tasks, training) go to one node; otherwise delete it and deploy "
            "it with ReadWriteMany, or SET=cluster.model_cache_claim= (each pod then downloads its own)"
        )
    return f"claim {name} is {phase}" + (" (bound by the first pod that mounts it)" if phase == "Pending" else "")


def check_rights(cluster: KubernetesApi, kind: JobKind | None) -> str:
    """Ask whether the tasks of a run may report their outcome and, where training has pods of its own, run its jobs."""
    rights = [*_WORKFLOW_RIGHTS, *_rights_on_jobs(kind, "create", "get", "patch", "delete")]
    rights += _FOLLOW_RIGHTS if kind else ()
    try:
        refused = [
            f"{verb} {name}" for verb, group, name in rights if not cluster.may(PIPELINE_ACCOUNT, verb, group, name)
        ]
    except ForbiddenError:
        account = f"system:serviceaccount:{cluster.namespace}:{PIPELINE_ACCOUNT}"
        asked = f"{kind.plural}.{kind.group}" if kind else "workflowtaskresults.argoproj.io"
        raise ForbiddenError(
            f"ask somebody who may: kubectl auth can-i create {asked} --namespace {cluster.namespace} --as {account}"
        ) from None
    if refused:
        raise KubernetesError(
            f"may not {', '.join(refused)}: make deploy OVERLAY=... binds the roles dice-training and dice-workflow"
        )
    return "may report outcomes" + (f", create, follow and delete {kind.name}s" if kind else "")


def _rights_on_jobs(kind: JobKind | None, *verbs: str) -> _Rights:
    return [(verb, kind.group, kind.plural) for verb in verbs] if kind else []


def check_own_rights(cluster: KubernetesApi, rights: _Rights) -> str:
    """Ask whether this person may do what make status, logs and cancel do. A run itself needs none of it."""
    refused = [f"{verb} {name}" for verb, group, name in rights if not cluster.may("", verb, group, name)]
    if refused:
        raise UncertainError(f"you may not {', '.join(refused)}: make status, logs or cancel will need it, ask for it")
    return "you may do what make status, logs and cancel do"


def check_shared_memory(config: ClusterConfig, launch: LaunchConfig) -> str:
    """Compare /dev/shm with the memory of the pods, which it is a part of."""
    pods = {"a GPU task": (config.gpu_task_shm_size, config.gpu_task_memory)}
    pods["a training pod"] = (config.trainer_shm_size, config.trainer_memory)
    for name, (size, memory) in pods.items():
        if size and quantity(size) > quantity(memory) / 2:
            raise ConfigError(f"/dev/shm of {name} is {size} of its {memory}: leave half for the processes")
    if launch.processes_per_node > 1 and not pods["a training pod"][0]:
        raise ConfigError(
            "/dev/shm of a training pod is the 64 MiB of Kubernetes, NCCL needs more: SET=cluster.trainer_shm_size=64Gi"
        )
    return ", ".join(f"{size or '64Mi'} of {memory} for {name}" for name, (size, memory) in pods.items())

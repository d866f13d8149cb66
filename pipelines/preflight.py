"""`make preflight`: look whether the cluster has what a run of a preset needs, before hours are spent on finding out.

One line a check: ok, FAIL and what to do, or `?` where it cannot be looked at from here. It changes nothing but one
small object in S3, which it deletes again.
"""

import argparse
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal
from urllib.parse import urlsplit

from dice_core import layout
from dice_core.config import ConfigError, LaunchConfig
from dice_core.pod_settings import quantity
from dice_core.storage import ConflictError, StorageError, open_storage
from pipelines.cluster import (
    CONFIG_KEYS,
    CONFIG_MAP,
    CREDENTIAL_KEYS,
    PIPELINE_ACCOUNT,
    TRAINER_ACCOUNT,
    ClusterConfig,
)
from pipelines.cluster_api import ClusterApi, ClusterError, ForbiddenError
from pipelines.kfp_api import Connection, KfpApi, KfpError
from pipelines.node_checks import check_images, check_nodes
from pipelines.presets import Preset
from pipelines.resources import launch_on_cluster
from pipelines.submit import chosen_root

_Rights = Sequence[tuple[str, str, str]]
_WORKFLOW_RIGHTS: _Rights = [
    # Argo's executor reports the outcome of every step by it.
    *((verb, "argoproj.io", "workflowtaskresults") for verb in ("create", "patch")),
]
_TRAINING_RIGHTS: _Rights = [
    *((verb, "kubeflow.org", "pytorchjobs") for verb in ("create", "get", "list", "watch", "patch", "delete")),
    *((verb, "", "pods") for verb in ("get", "list", "watch")),
    ("get", "", "pods/log"),
    *((verb, "", "events") for verb in ("get", "list", "watch")),
]
_DEPLOY = "make deploy OVERLAY=... makes it"


@dataclass(frozen=True)
class Line:
    """The result of one check."""

    state: Literal["ok", "FAIL", "?"]
    what: str
    text: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.state:<5} {self.what}: {self.text}"


def preflight(options: argparse.Namespace, preset: Preset) -> int:
    """Print a line for each check; return 1 if one failed."""
    failed = 0
    for line in lines(options, preset):
        print(line, flush=True)
        failed += line.state == "FAIL"
    if failed:
        print(f"{failed} to put right before make submit PRESET={preset.name}")
    return int(failed > 0)


def lines(options: argparse.Namespace, preset: Preset) -> Iterator[Line]:
    """Yield the checks' results."""
    connection = Connection.from_environment(options.host, options.namespace)
    yield _checked("settings", partial(check_settings, preset))
    yield _checked("Kubeflow Pipelines", partial(check_kfp, connection))
    cluster = None
    try:
        cluster = ClusterApi(options.context, connection.namespace)
        version = cluster.get("/version") or {}
        yield Line("ok", "Kubernetes", f"{version.get('gitVersion', 'unknown version')} at {cluster.host}")
    except ClusterError as error:
        yield Line("FAIL", "Kubernetes", str(error))
        cluster = None
    if cluster:
        yield from cluster_lines(cluster, preset)
    else:
        yield Line("?", "accounts, rights, training operator, nodes", "not looked at: they need the Kubernetes API")
    yield from s3_lines(options, cluster)


def _checked(what: str, check: Callable[[], str]) -> Line:
    """Run a check that returns what it found, or raises what is wrong."""
    try:
        return Line("ok", what, check())
    except ForbiddenError as error:
        return Line("?", what, f"you may not look: {error}")
    except (ValueError, KfpError, ClusterError, StorageError) as error:
        return Line("FAIL", what, str(error))


def check_settings(preset: Preset) -> str:
    """Check what the cluster section and the launch section say together; the rest was checked as it was read."""
    if preset.cluster and preset.cluster.training_backend == "torchrun" and preset.launch.num_nodes > 1:
        raise ConfigError("launch.num_nodes: cluster.training_backend=torchrun trains on one node only")
    return preset.description


def check_kfp(connection: Connection) -> str:
    """Reach Kubeflow Pipelines and list runs as this person."""
    api = KfpApi(connection)
    api.runs()
    return api.host + (f", several users, namespace {connection.namespace}" if api.is_multi_user else "")


def cluster_lines(cluster: ClusterApi, preset: Preset) -> Iterator[Line]:
    """Yield what the Kubernetes API tells: objects, rights, the training operator, nodes, quota."""
    config, launch = preset.cluster or ClusterConfig(), launch_on_cluster(preset)
    is_elsewhere = config.training_backend == "pytorchjob"
    for account in (PIPELINE_ACCOUNT, *((TRAINER_ACCOUNT,) if is_elsewhere else ())):
        yield _checked(f"service account {account}", partial(check_object, cluster, "serviceaccounts", account))
    yield _checked(f"config map {CONFIG_MAP}", partial(check_object, cluster, "configmaps", CONFIG_MAP, CONFIG_KEYS))
    if config.credentials_secret:
        secret = partial(check_object, cluster, "secrets", config.credentials_secret, CREDENTIAL_KEYS)
        yield _checked(f"secret {config.credentials_secret}", secret)
    if config.env_secret:
        secret = partial(check_object, cluster, "secrets", config.env_secret, config.env_secret_keys)
        yield _checked(f"secret {config.env_secret}", secret)
    for name in config.image_pull_secrets:
        yield _checked(f"image pull secret {name}", partial(check_object, cluster, "secrets", name))
    if config.model_cache_claim:
        yield _checked("model cache", partial(check_claim, cluster, config.model_cache_claim))
    if is_elsewhere:
        yield _checked("training operator", partial(check_operator, cluster))
    rights = [*_WORKFLOW_RIGHTS, *(_TRAINING_RIGHTS if is_elsewhere else ())]
    yield _checked(f"rights of {PIPELINE_ACCOUNT}", partial(check_rights, cluster, rights))
    yield _checked("images", partial(check_images, cluster))
    yield _checked("shared memory", partial(check_shared_memory, config, launch))
    yield _checked("nodes", partial(check_nodes, cluster, config, launch))
    if config.gpu_resource:
        yield _checked("quota", partial(check_quota, cluster, config, launch, preset.num_shards))


def check_object(cluster: ClusterApi, resource: str, name: str, keys: tuple[str, ...] = ()) -> str:
    """Find an object of the namespace, with keys in its data."""
    found = cluster.named(resource, name)
    if found is None:
        raise ClusterError(f"there is none in namespace {cluster.namespace}: {_DEPLOY}")
    missing = [key for key in keys if key not in (found.get("data") or {})]
    if missing:
        raise ClusterError(f"has no key {', '.join(missing)}: add it, or deploy again")
    return f"in namespace {cluster.namespace}"


def check_claim(cluster: ClusterApi, name: str) -> str:
    """Find the volume claim; one that waits for its first pod is as good as a bound one, if its class exists."""
    found = cluster.named("persistentvolumeclaims", name)
    if found is None:
        raise ClusterError(f"no claim {name} in namespace {cluster.namespace}: {_DEPLOY}")
    phase = found.get("status", {}).get("phase", "Pending")
    if phase == "Lost":
        raise ClusterError(f"claim {name} has lost its volume: delete it and deploy again")
    if phase != "Pending":
        return f"claim {name} is {phase}"
    wanted = found["spec"].get("storageClassName")
    if wanted and cluster.get(f"/apis/storage.k8s.io/v1/storageclasses/{wanted}") is None:
        raise ClusterError(
            f"claim {name} waits for the storage class {wanted}, which the cluster does not have: install it, or name "
            "one that it has in the overlay, delete the claim and deploy again"
        )
    return f"claim {name} is Pending (bound by the first pod that mounts it)"


def check_operator(cluster: ClusterApi) -> str:
    """Find the PyTorchJob resource."""
    found = cluster.get("/apis/kubeflow.org/v1")
    if not found or "pytorchjobs" not in {entry["name"] for entry in found["resources"]}:
        raise ClusterError(
            "the API knows no PyTorchJob: install the training operator (manifests/README.md names the release), or "
            "train in the task's own pod: SET=cluster.training_backend=torchrun"
        )
    return "PyTorchJob kubeflow.org/v1"


def check_rights(cluster: ClusterApi, rights: _Rights) -> str:
    """Ask whether the tasks of a run may do what they do: report their outcome, and run PyTorchJobs."""
    try:
        refused = [
            f"{verb} {name}" for verb, group, name in rights if not cluster.may(PIPELINE_ACCOUNT, verb, group, name)
        ]
    except ForbiddenError:
        account = f"system:serviceaccount:{cluster.namespace}:{PIPELINE_ACCOUNT}"
        raise ForbiddenError(
            f"ask somebody who may: kubectl auth can-i create pytorchjobs.kubeflow.org --namespace "
            f"{cluster.namespace} --as {account}"
        ) from None
    if refused:
        raise ClusterError(
            f"may not {', '.join(refused)}: make deploy OVERLAY=... binds the roles dice-training and dice-workflow"
        )
    has_training = len(rights) > len(_WORKFLOW_RIGHTS)
    return "may report outcomes" + (", create, follow and delete PyTorchJobs" if has_training else "")


def check_shared_memory(config: ClusterConfig, launch: LaunchConfig) -> str:
    """Compare /dev/shm with the memory of the pods, of which it is a part."""
    pods = {"a GPU task": (config.gpu_task_shm_size, config.gpu_task_memory)}
    pods["a training pod"] = (launch.shm_size or config.trainer_shm_size, launch.memory or config.trainer_memory)
    for name, (size, memory) in pods.items():
        if size and quantity(size) > quantity(memory) / 2:
            raise ConfigError(f"/dev/shm of {name} is {size} of its {memory}: leave half for the processes")
    if launch.processes_per_node > 1 and not pods["a training pod"][0]:
        raise ConfigError(
            "/dev/shm of a training pod is the 64 MiB of Kubernetes, NCCL needs more: SET=cluster.trainer_shm_size=64Gi"
        )
    return ", ".join(f"{size or '64Mi'} of {memory} for {name}" for name, (size, memory) in pods.items())


def check_quota(cluster: ClusterApi, config: ClusterConfig, launch: LaunchConfig, num_shards: int) -> str:
    """Compare the namespace's GPU quotas with the most that training holds at once."""
    name = f"requests.{config.gpu_resource}"
    needed, shown = launch.num_nodes * launch.processes_per_node, []
    for quota in cluster.list(f"/api/v1/namespaces/{cluster.namespace}/resourcequotas"):
        hard = quota["spec"].get("hard", {}).get(name)
        if hard is None:
            continue
        if quantity(hard) < needed:
            raise ClusterError(
                f"{quota['metadata']['name']} allows {hard} {config.gpu_resource}, training holds {needed}: raise it "
                "in the overlay"
            )
        shown.append(f"{quota['metadata']['name']} allows {hard} GPUs, training holds {needed}, shards {num_shards}")
    return "; ".join(shown) or "none on GPUs"


def s3_lines(options: argparse.Namespace, cluster: ClusterApi | None) -> Iterator[Line]:
    """Yield whether runs have a place, and whether it can be written, from this machine."""
    try:
        root = chosen_root(options.root, partial(deployed, cluster, "DICE_ROOT"))
    except ConfigError as error:
        yield Line("FAIL", "root", str(error))
        return
    yield Line("ok", "root", root)
    endpoint = deployed(cluster, "AWS_ENDPOINT_URL")
    host = urlsplit(endpoint).hostname or ""
    if host and "." not in host.removesuffix(".svc") and not os.environ.get("AWS_ENDPOINT_URL"):
        yield Line(
            "?",
            "S3",
            f"{endpoint} is inside the cluster; to look from here: kubectl port-forward service/{host} 8333:8333, and "
            "AWS_ENDPOINT_URL=http://localhost:8333 with the keys of the secret",
        )
        return
    yield _checked("S3, from this machine", partial(check_s3, root))


def deployed(cluster: ClusterApi | None, key: str) -> str:
    """Return what the cluster was deployed with; empty where it does not say. That it is there, another line tells."""
    try:
        found = cluster.named("configmaps", CONFIG_MAP) if cluster else None
    except ClusterError:
        return ""
    return str(((found or {}).get("data") or {}).get(key, ""))


def check_s3(root: str) -> str:
    """Write, read and delete an object; a second writer must be held off, or promoting a policy is not safe."""
    storage, key = open_storage(layout.join(root, "preflight")), uuid.uuid4().hex
    storage.write_if_version(key, b"first", None)
    try:
        try:
            storage.write_if_version(key, b"second", None)
        except ConflictError:
            if storage.read_bytes(key) != b"first":
                raise StorageError(f"{root}: an object that was written reads differently") from None
        else:
            raise StorageError(f"{root}: this S3 server ignores conditional writes: two runs could promote at once")
    finally:
        storage.delete(key)
    return f"put, get, conditional put and delete work below {root}"

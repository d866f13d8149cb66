"""Preflight checks of the nodes: do they have the images, and can they take the pods of a run?"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from components import images
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.launch.settings import LaunchConfig
from dice_core.settings.quantities import quantity
from dice_core.training.disk import most_parameters
from pipelines.cluster.config import ClusterConfig
from pipelines.preflight.findings import UncertainError

_NODES = "/api/v1/nodes"


_DRIVER_LABELS = ("nvidia.com/cuda.driver-version.major", "nvidia.com/cuda.driver.major")
"""Of GPU feature discovery, today's and that of its older releases."""
_OLDEST_DRIVER = 580
"""Of CUDA 13, which torch in the images is built with."""


@dataclass(frozen=True)
class Pods:
    """Pods that run at the same time: what each requests, and where they may go."""

    what: str
    number: int
    requests: Mapping[str, str]
    pool: str
    """Prefix of the settings that choose their nodes."""
    selector: Mapping[str, str]
    tolerations: Sequence[Mapping[str, Any]]
    sizes: str
    """The settings that decide the requests."""


def training_pods(config: ClusterConfig, launch: LaunchConfig) -> Pods:
    """Return the training pods. The other tasks with GPUs go to the same nodes and are smaller."""
    requests = {"cpu": config.trainer_cpu, "memory": config.trainer_memory, **config.trainer_extra_resources}
    if config.trainer_disk:
        requests["ephemeral-storage"] = config.trainer_disk
    if config.gpu_resource:
        requests[config.gpu_resource] = str(launch.processes_per_node)
    selector, tolerations = config.gpu_node_selector, config.gpu_tolerations
    sizes = "cluster.trainer_cpu, cluster.trainer_memory, cluster.trainer_extra_resources, launch.processes_per_node"
    return Pods("a training pod", launch.num_nodes, requests, "cluster.gpu", selector, tolerations, sizes)


def cpu_task_pods(config: ClusterConfig) -> Pods:
    """Return the largest task without a GPU."""
    requests = {
        "cpu": max(config.cpu_task_cpu, config.launcher_cpu, key=quantity),
        "memory": max(config.cpu_task_memory, config.import_memory, config.launcher_memory, key=quantity),
    }
    selector, tolerations = config.cpu_node_selector, config.cpu_tolerations
    sizes = "cluster.cpu_task_cpu, cluster.cpu_task_memory, cluster.import_memory"
    return Pods("the largest CPU task", 1, requests, "cluster.cpu", selector, tolerations, sizes)


def check_images(cluster: KubernetesApi, wanted: Sequence[str]) -> str:
    """Look for images without a registry on the nodes, where make kind-load puts them.

    Args:
        cluster: with the nodes.
        wanted: full names of the images.

    Raises:
        KubernetesError: an image is on no node, or its tag was never pushed.
    """
    if images.names_a_registry(wanted[0]):
        if changed := [image for image in wanted if image.endswith("-dirty")]:
            raise KubernetesError(
                f"{', '.join(changed)}: built from sources with changes, and make push pushes no such tag: commit, "
                "then make images push, or give TAG="
            )
        return f"{', '.join(wanted)}, to be pulled"
    nodes = cluster.list(_NODES)
    names = {name for node in nodes for image in node["status"].get("images", ()) for name in image.get("names") or ()}
    missing = [image for image in wanted if not any(f"/{name}".endswith(f"/{image}") for name in names)]
    if missing:
        raise KubernetesError(
            f"{', '.join(missing)}: on no node, and the name has no registry: make kind-load with the same TAG, or "
            "make push REGISTRY=registry.example.com/dice and the same REGISTRY here"
        )
    return f"{', '.join(wanted)}, on the nodes"


def check_nodes(cluster: KubernetesApi, pods: Pods) -> str:
    """Count the nodes that can take the pods.

    Raises:
        UncertainError: there are too few now, but an autoscaler may add some.
        KubernetesError: there are nodes, and none of them can take the pods.
    """
    selector = ",".join(f"{name}={value}" for name, value in pods.selector.items())
    nodes = _pool(cluster, pods.selector, pods.requests.keys() - {"cpu", "memory"})
    faults = {node["metadata"]["name"]: _fault(node, pods) for node in nodes}
    usable = [name for name, fault in faults.items() if not fault]
    wanted = f"{pods.what} ({', '.join(f'{value} {name}' for name, value in pods.requests.items())})"
    if len(usable) >= pods.number:
        return f"{len(usable)} of {len(nodes)} can take {wanted}"
    if nodes and not usable:
        reasons = "; ".join(f"{name} {fault}" for name, fault in list(faults.items())[:3])
        raise KubernetesError(
            f"none of {len(nodes)} can take {wanted}: {reasons}. Add one that can; the requests come from {pods.sizes}"
        )
    raise UncertainError(
        f"{len(usable)} {f'with the labels {selector} ' if selector else ''}can take {wanted} now, {pods.number} are "
        f"needed: right where an autoscaler makes more (from zero too); otherwise start them, or SET='{pods.pool}"
        "_node_selector=...'"
    )


def check_disk(cluster: KubernetesApi, config: ClusterConfig) -> str:
    """Say which models the disks of the GPU nodes are large enough for: the request follows from the model, in the run.

    Raises:
        UncertainError: no node says how large its disk is.
    """
    nodes = _gpu_nodes(cluster, config)
    offers = [node["status"].get("allocatable", {}).get("ephemeral-storage") for node in nodes]
    sizes = [quantity(offer) for offer in offers if offer]
    if not sizes:
        raise UncertainError("no node of the pool tells its disk; two checkpoints take 24 bytes a parameter")
    return (
        f"the smallest offers {min(sizes) / 1e9:.0f} GB: two checkpoints and the finished model of up to "
        f"{most_parameters(min(sizes)) / 1e9:.1f} billion parameters fit, on one node"
    )


def _gpu_nodes(cluster: KubernetesApi, config: ClusterConfig) -> list[dict[str, Any]]:
    """Return the nodes that GPU tasks go to."""
    return _pool(cluster, config.gpu_node_selector, {config.gpu_resource} - {""})


def _pool(cluster: KubernetesApi, selector: Mapping[str, str], resources: AbstractSet[str]) -> list[dict[str, Any]]:
    """Return the nodes with a pool's labels; without labels, those that have such resources at all."""
    if selector:
        return cluster.list(_NODES, labelSelector=",".join(f"{name}={value}" for name, value in selector.items()))
    return [node for node in cluster.list(_NODES) if resources <= node["status"].get("allocatable", {}).keys()]


def _labels(node: Mapping[str, Any]) -> Mapping[str, str]:
    return node["metadata"].get("labels") or {}


def check_driver(cluster: KubernetesApi, config: ClusterConfig) -> str:
    """Compare the driver of the GPU nodes with what the images' CUDA needs; GPU feature discovery labels them.

    Raises:
        UncertainError: no node says which driver it has.
        KubernetesError: a node's driver is too old.
    """
    found = {node["metadata"]["name"]: _driver(_labels(node)) for node in _gpu_nodes(cluster, config)}
    drivers = {name: major for name, major in found.items() if major}
    if not drivers:
        raise UncertainError(
            f"no node has the label {_DRIVER_LABELS[0]} (GPU feature discovery writes it): CUDA 13 needs driver "
            f"{_OLDEST_DRIVER} or newer, nvidia-smi on a node says which there is"
        )
    if old := {name: major for name, major in drivers.items() if major < _OLDEST_DRIVER}:
        names = ", ".join(f"{name} has {major}" for name, major in list(old.items())[:3])
        raise KubernetesError(f"{names}: the images' CUDA 13 needs {_OLDEST_DRIVER} or newer, update the nodes' driver")
    return f"{', '.join(map(str, sorted(set(drivers.values()))))} on {len(drivers)} nodes, {_OLDEST_DRIVER} is needed"


def _driver(labels: Mapping[str, str]) -> int:
    """Return the major version of a node's driver; 0 where none is told."""
    told = next((labels[name] for name in _DRIVER_LABELS if labels.get(name)), "")
    return int(told) if told.isdecimal() else 0


def _fault(node: Mapping[str, Any], pods: Pods) -> str:
    """Return why a node cannot take a pod, or an empty text if it can."""
    ready = {entry["type"]: entry["status"] for entry in node["status"].get("conditions", ())}.get("Ready")
    if ready != "True":
        return "is not ready"
    if node["spec"].get("unschedulable"):
        return "is cordoned"
    for taint in node["spec"].get("taints", ()):
        if taint["effect"] != "PreferNoSchedule" and not any(_tolerates(rule, taint) for rule in pods.tolerations):
            return f"has the taint {taint['key']}:{taint['effect']}, which {pods.pool}_tolerations does not tolerate"
    offered = node["status"].get("allocatable", {})
    for name, value in pods.requests.items():
        if quantity(offered.get(name, "0")) < quantity(value):
            return f"offers {offered.get(name, 'no')} {name}, {value} are needed"
    return ""


def _tolerates(rule: Mapping[str, str], taint: Mapping[str, str]) -> bool:
    """Return whether a toleration covers a taint, by Kubernetes' rules."""
    if rule.get("effect") and rule["effect"] != taint["effect"]:
        return False
    if rule.get("operator", "Equal") == "Exists":
        return rule.get("key", "") in ("", taint["key"])
    return rule.get("key") == taint["key"] and rule.get("value", "") == taint.get("value", "")

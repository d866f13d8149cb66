"""What preflight asks of the nodes: do they have the images, can one of them take a training pod."""

from collections.abc import Mapping
from typing import Any

from components import images
from dice_core.config import LaunchConfig
from dice_core.pod_settings import quantity
from pipelines.cluster import ClusterConfig
from pipelines.cluster_api import ClusterApi, ClusterError


def check_images(cluster: ClusterApi) -> str:
    """Find images that no registry has on the nodes: a cluster of kind gets them by make kind-load."""
    wanted = [images.CORE, images.GENERATE, images.TRAIN]
    if images.names_a_registry(wanted[0]):
        if changed := [image for image in wanted if image.endswith("-dirty")]:
            raise ClusterError(
                f"{', '.join(changed)}: built from sources with changes, and make push pushes no such tag: commit, "
                "then make images push, or give TAG="
            )
        return f"{', '.join(wanted)}, to be pulled"
    nodes = cluster.list("/api/v1/nodes")
    names = {name for node in nodes for image in node["status"].get("images", ()) for name in image.get("names") or ()}
    missing = [image for image in wanted if not any(f"/{name}".endswith(f"/{image}") for name in names)]
    if missing:
        raise ClusterError(
            f"{', '.join(missing)}: on no node, and the name has no registry: make kind-load with the same TAG, or "
            "make push REGISTRY=registry.example.com/dice and the same REGISTRY here"
        )
    return f"{', '.join(wanted)}, on the nodes"


def check_nodes(cluster: ClusterApi, config: ClusterConfig, launch: LaunchConfig) -> str:
    """Find nodes that can take the training pods, and with them the smaller ones of the other stages."""
    selector = ",".join(f"{name}={value}" for name, value in config.gpu_node_selector.items())
    nodes = cluster.list("/api/v1/nodes", **({"labelSelector": selector} if selector else {}))
    if not nodes and not selector:
        raise ClusterError("there is none: start the pool")
    if not nodes:
        raise ClusterError(f"none has the labels {selector}: start the pool, or SET='cluster.gpu_node_selector=...'")
    needs = {
        "cpu": launch.cpu or config.trainer_cpu,
        "memory": launch.memory or config.trainer_memory,
        **({config.gpu_resource: str(launch.processes_per_node)} if config.gpu_resource else {}),
    }
    faults = {node["metadata"]["name"]: _fault(node, needs, config) for node in nodes}
    usable = [name for name, fault in faults.items() if not fault]
    if len(usable) < launch.num_nodes:
        reasons = "; ".join(f"{name} {fault}" for name, fault in list(faults.items())[:3] if fault)
        raise ClusterError(f"training needs {launch.num_nodes}, {len(usable)} of {len(nodes)} can take it: {reasons}")
    wanted = ", ".join(f"{value} {name}" for name, value in needs.items())
    return f"{len(usable)} of {len(nodes)} can take a training pod ({wanted})"


def _fault(node: Mapping[str, Any], needs: Mapping[str, str], config: ClusterConfig) -> str:
    """Return why a node cannot take a training pod; empty if it can."""
    ready = {entry["type"]: entry["status"] for entry in node["status"].get("conditions", ())}.get("Ready")
    if ready != "True":
        return "is not ready"
    if node["spec"].get("unschedulable"):
        return "is cordoned"
    for taint in node["spec"].get("taints", ()):
        if taint["effect"] != "PreferNoSchedule" and not any(
            _tolerates(rule, taint) for rule in config.gpu_tolerations
        ):
            return f"has the taint {taint['key']}:{taint['effect']}, which cluster.gpu_tolerations does not tolerate"
    offered = node["status"].get("allocatable", {})
    for name, value in needs.items():
        if quantity(offered.get(name, "0")) < quantity(value):
            return f"offers {offered.get(name, 'no')} {name}, {value} are needed"
    return ""


def _tolerates(rule: Mapping[str, str], taint: Mapping[str, str]) -> bool:
    """Return whether a toleration covers a taint, by the rules of Kubernetes."""
    if rule.get("effect") and rule["effect"] != taint["effect"]:
        return False
    if rule.get("operator", "Equal") == "Exists":
        return rule.get("key", "") in ("", taint["key"])
    return rule.get("key") == taint["key"] and rule.get("value", "") == taint.get("value", "")

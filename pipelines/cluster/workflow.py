"""The Argo workflow of a run: the states of its nodes, also where Argo keeps them compressed.

Reads one object of the cluster; what the nodes mean for a run's tasks is told by kfp/task_states.py.
"""

import base64
import gzip
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dice_core.launch.kubernetes import KubernetesApi

_GROUP, _VERSION, _RESOURCE = "argoproj.io", "v1alpha1", "workflows"
KFP_RUN_LABEL = "pipeline/runid"
"""KFP's label of whatever belongs to a run."""
_ATTEMPT = re.compile(r"\((\d+)\)(?=\.|$)")


@dataclass(frozen=True)
class Node:
    """A node of a workflow."""

    path: str
    """Keys joined by dots, below the workflow's own."""
    attempt: int | None
    """Of a node that is one attempt of the node with its path; from 0."""
    phase: str
    message: str
    started: str
    finished: str
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Workflow:
    """The workflow of a run."""

    phase: str
    nodes: tuple[Node, ...] | None
    """None: they are kept where they cannot be read from here."""

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.phase in ("Succeeded", "Failed", "Error")


def workflow_of(cluster: KubernetesApi, run_id: str) -> Workflow | None:
    """Return the workflow of a run; None: this namespace has none (any more).

    Raises:
        KubernetesError: it may not be read, or the cluster does not answer.
    """
    found = cluster.list(_path(cluster), labelSelector=f"{KFP_RUN_LABEL}={run_id}")
    return parse_workflow(found[0]) if found else None


def has_workflow_of_any(cluster: KubernetesApi, run_ids: Iterable[str]) -> bool:
    """Return whether one of some runs has a workflow in this namespace.

    Raises:
        KubernetesError: as workflow_of.
    """
    # One is enough: a workflow may have a megabyte.
    return bool(cluster.list(_path(cluster), labelSelector=f"{KFP_RUN_LABEL} in ({','.join(run_ids)})", limit="1"))


def _path(cluster: KubernetesApi) -> str:
    return cluster.path(_RESOURCE, group=_GROUP, version=_VERSION)


def parse_workflow(body: Mapping[str, Any]) -> Workflow:
    """Return a workflow as the API has it."""
    status, name = body.get("status", {}), str(body["metadata"]["name"])
    nodes = _nodes(status)
    parsed = None if nodes is None else tuple(_parse_node(name, node) for node in nodes.values())
    return Workflow(str(status.get("phase") or ""), parsed)


def _nodes(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if packed := status.get("compressedNodes"):
        return dict(json.loads(gzip.decompress(base64.b64decode(packed))))
    if status.get("offloadNodeStatusVersion"):
        return None
    return dict(status.get("nodes") or {})


def path_of(node_name: str, workflow: str) -> str:
    """Return the path of a node by its name, in which Argo counts attempts and puts the workflow's name in front."""
    return _ATTEMPT.sub("", node_name.removeprefix(workflow)).removeprefix(".")


def _parse_node(workflow: str, node: Mapping[str, Any]) -> Node:
    name = str(node["name"]).removeprefix(workflow)
    attempts = [match for match in _ATTEMPT.finditer(name) if match.end() == len(name)]
    parameters = (node.get("inputs") or {}).get("parameters") or ()
    return Node(
        path=path_of(str(node["name"]), workflow),
        attempt=int(attempts[0][1]) if attempts else None,
        phase=str(node.get("phase", "")),
        message=str(node.get("message") or ""),
        started=str(node.get("startedAt") or ""),
        finished=str(node.get("finishedAt") or ""),
        inputs={entry["name"]: str(entry["value"]) for entry in parameters if "value" in entry},
    )

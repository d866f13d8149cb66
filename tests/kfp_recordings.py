"""What a real Kubeflow answered: tests/data/kfp-2.17.0, whose README says what is true of each answer."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "data" / "kfp-2.17.0"


def recorded(name: str) -> dict[str, Any]:
    """Return an answer, as JSON."""
    return dict(json.loads((_FOLDER / f"{name}.json").read_text()))


def nodes_of(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the nodes of a workflow by id."""
    packed = base64.b64decode(workflow["status"]["compressedNodes"])
    return dict(json.loads(gzip.decompress(packed)))


def recorded_nodes(*names: str) -> list[dict[str, Any]]:
    """Return the nodes of recorded workflows."""
    return [node for name in names for node in nodes_of(recorded(name)).values()]


def recorded_pipeline(workflow: str) -> dict[str, Any]:
    """Return the compiled pipeline of a recorded workflow, as far as its graphs go.

    Argo has the graphs under their names; of a task's own component its key alone is left.
    """
    given = {entry["name"]: entry["value"] for entry in recorded(workflow)["spec"]["arguments"]["parameters"]}
    graphs = {name.removeprefix("components-"): json.loads(value) for name, value in given.items() if "dag" in value}
    root, executors = graphs.pop("root"), {}
    for graph in (root, *list(graphs.values())):
        for key, task in graph["dag"]["tasks"].items():
            reference = task["componentRef"]["name"]
            if reference not in graphs:
                label = reference.replace("comp-", "exec-")
                graphs[reference] = {"executorLabel": label}
                executors[label] = {"container": {"args": [key.rstrip("0123456789").rstrip("-")]}}
    return {"root": root, "components": graphs, "deploymentSpec": {"executors": executors}}

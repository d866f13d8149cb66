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

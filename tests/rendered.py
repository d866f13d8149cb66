"""The manifests as `kubectl kustomize` renders them, for the tests; needs kubectl and no cluster."""

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).parents[1] / "manifests"
OVERLAYS = ["kind", "a100", "kueue"]
Object = dict[str, Any]


@cache
def render(folder: str) -> list[Object]:
    """Return the objects that a folder of manifests/ comes to."""
    command = ["kubectl", "kustomize", str(MANIFESTS / folder)]
    # A proxy that is not there: nothing may be fetched.
    no_network = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | no_network, check=False)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def overlay(name: str) -> list[Object]:
    return render(f"overlays/{name}")


def find(objects: list[Object], kind: str, name: str) -> Object:
    return next(o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [o for o in objects if o["kind"] == kind]


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def images_of(objects: list[Object]) -> list[str]:
    templates = [o["spec"]["template"]["spec"] for o in of_kind(objects, "Deployment")]
    return [container["image"] for template in templates for container in template["containers"]]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()

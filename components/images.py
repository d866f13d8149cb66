"""Names of the container images, the only place that has them.

Read when a pipeline is compiled: set DICE_REGISTRY and DICE_TAG to compile for your registry, or one image's own
variable to give it a digest (`DICE_TRAIN_IMAGE=registry/dice-train@sha256:...`).
"""

import os

from dice_core import __version__

_REGISTRY = os.environ.get("DICE_REGISTRY", "dice-suite").rstrip("/")
_TAG = os.environ.get("DICE_TAG", __version__)


def names_a_registry(image: str) -> bool:
    """Return whether an image's name says which registry has it; otherwise nodes would ask Docker Hub."""
    first, slash, _ = image.partition("/")
    return bool(slash) and (first == "localhost" or any(mark in first for mark in ".:"))


def _image(name: str) -> str:
    return os.environ.get(f"DICE_{name.upper()}_IMAGE", f"{_REGISTRY}/dice-{name}:{_TAG}")


CORE = _image("core")
"""No GPU: data, pairs, the launcher of training, the report."""
GENERATE = _image("generate")
"""vLLM: sampling, scoring, measuring policies."""
TRAIN = _image("train")
"""torch and DeepSpeed: training, and importing models."""

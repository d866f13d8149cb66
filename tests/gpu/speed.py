"""Scoring and training of a whole model of 8 billion random weights: tokens per second, MFU, peak memory.

Forward and backward with gradients in bfloat16, 32 GB; the optimizer, which would not fit, is the section `training`.
"""

from collections.abc import Iterator
from typing import Any

from tests.benchmarks.gpu import measure_shape
from tests.gpu.scale import Scale


def measure(scale: Scale) -> Iterator[dict[str, Any]]:
    """Measure ours and upstream's way, which have to agree on a small model in float32 before."""
    lines = measure_shape(scale.shape_name, scale.shape, scale.device, scale.speed)
    yield {
        f"{scale.shape_name}, {line['what']}, {name}": value
        for line in lines
        for name, value in line.items()
        if name not in ("shape", "what", "slowest", "fastest") and value is not None
    }

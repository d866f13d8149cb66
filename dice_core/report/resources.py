"""What a run took: time, GPU hours and their price, memory. Pure functions of what the stages measured themselves.

Waiting for pods, downloading images and attempts that failed are not in it: stages cannot measure them.
"""

from typing import Any

from dice_core.report.run_data import RunData, StageData


def gpu_hours(stage: StageData) -> float | None:
    """Return the hours of all GPUs that a stage held, over all its shards; None where it held none, or did not say."""
    metrics = [manifest.metrics for manifest in stage.manifests.values()]
    held = [(float(one.get("seconds", 0)), int(one.get("num_gpus", 0))) for one in metrics]
    hours = sum(seconds * number for seconds, number in held) / 3600
    return hours or None


def resources(data: RunData, gpu_hour_price: float) -> dict[str, Any]:
    """Return what the whole run took; None where that is not known.

    Args:
        data: of the run.
        gpu_hour_price: 0: not known.
    """
    stages = [data.data, *(stage for iteration in data.iterations for stage in iteration.stages.values())]
    seconds = [float(stage.metrics["seconds"]) for stage in stages if "seconds" in stage.metrics]
    hours = sum(gpu_hours(stage) or 0 for stage in stages) or None
    memory = [stage.metrics["peak_memory_bytes"] for stage in stages if "peak_memory_bytes" in stage.metrics]
    return {
        "seconds": sum(seconds) or None,
        "gpu_hours": hours,
        "gpu_hour_price": gpu_hour_price or None,
        "cost": hours * gpu_hour_price if hours and gpu_hour_price else None,
        "peak_memory_bytes": max(memory, default=None),
    }

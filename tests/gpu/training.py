"""Training as a pipeline runs it: ZeRO-3 with its optimizer, bfloat16, layers done anew, checkpoints on their way.

Fewer layers than the whole model has, see scale.py; of one process, which holds all states. Shows tokens per second,
MFU and peak memory as a run reports them, and how long training stands still for a checkpoint, its first: later ones
find the memory that this one took.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu.jobs import train, write_pairs
from tests.gpu.models import write_model
from tests.gpu.scale import Scale

_SETTINGS = {
    "max_steps": 8,
    "global_batch_size": 8,
    "precision": "bf16",
    "deepspeed": "zero3",
    "gradient_checkpointing": True,
    "save_steps": 6,
}


def measure(scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield what the run reports, and the seconds of its checkpoints.

    Raises:
        LaunchError: the training failed.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ |= {"DICE_CACHE": str(folder / "cache"), "DICE_SCRATCH": str(folder / "scratch")}
        policy, pairs, out = folder / "policy", folder / "pairs.parquet", folder / "out"
        write_model(policy, scale.trained_shape, scale.device)
        write_pairs(pairs, num_pairs=64, num_tokens=scale.pair_tokens, vocabulary=scale.trained_vocabulary)
        run = train(out, policy, pairs, "tests.timed_worker", 1, _SETTINGS)
        stood_still = json.loads((out / "stood-still.json").read_text())
    metrics = run.metrics
    num_parameters = int(metrics["num_parameters"])
    yield {
        "model": f"{scale.num_trained_layers} layers of {scale.shape_name}, {num_parameters / 1e9:.2f}e9 weights",
        **_stated_mfu(metrics, scale),
        **{name: metrics[name] for name in ("tokens_per_second", "mfu", "seconds_per_step") if name in metrics},
        "peak memory, GB": metrics["peak_memory_bytes"] / 1e9,
        "checkpoint, GB": 12 * num_parameters / 1e9,
        "seconds that training stands still for it": stood_still[0],
        "seconds of the whole section's training": metrics["seconds"],
    }


def _stated_mfu(metrics: Any, scale: Scale) -> dict[str, float]:
    """Return MFU against what the card's maker states; the run's own is against what the card was measured to reach."""
    if scale.device == "cpu":
        return {}
    from dice_core.training.throughput import matmul_peak
    from tests.benchmarks.gpu import stated_peak

    stated = stated_peak()
    return {"mfu of the stated peak": metrics["mfu"] * matmul_peak() / stated} if stated else {}

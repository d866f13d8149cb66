"""ZeRO-3 with every matrix cut up and layers done anew against one process without ZeRO: losses and weights, float32.

One process with ZeRO-3 wherever there is a GPU; NCCL takes one process a GPU, so two of them where there are two.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu import SMALL_SHAPE
from tests.gpu.jobs import Trained, train, write_pairs
from tests.gpu.models import write_model
from tests.gpu.scale import Scale
from tests.partitioned_worker import PERSISTENCE_THRESHOLD

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 2e-4
"""A GPU sums in another order each time. Of a weight, a fifth of one step of Adam at the learning rate below."""
_SETTINGS = {
    "max_steps": 3,
    "global_batch_size": 4,
    "per_device_batch_size": 2,
    "learning_rate": 1e-3,
    "precision": "float32",
    "saved_dtype": "float32",
    "gradient_checkpointing": False,
}


def measure(scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield the largest differences by number of processes, as each is compared.

    Raises:
        AssertionError: one is beyond its tolerance, or a matrix lay whole in a process.
        LaunchError: a training failed.
    """
    numbers: dict[str, Any] = {}
    num_gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ |= {"DICE_CACHE": str(folder / "cache"), "DICE_SCRATCH": str(folder / "scratch")}
        policy, pairs = folder / "policy", folder / "pairs.parquet"
        write_model(policy, SMALL_SHAPE, "cpu")
        write_pairs(pairs, num_pairs=12, num_tokens=40, vocabulary=SMALL_SHAPE["vocab_size"])
        plain = train(folder / "plain", policy, pairs, "dice_core.training.worker", 1, _SETTINGS)
        changes = {"deepspeed": "zero3", "gradient_checkpointing": True}
        for num_processes in (1, 2) if num_gpus >= 2 else (1,):
            name = f"{num_processes} process{'es' if num_processes > 1 else ''}"
            cut = train(
                folder / name, policy, pairs, "tests.partitioned_worker", num_processes, {**_SETTINGS, **changes}
            )
            numbers[f"{name}: matrices cut up"] = _num_cut(cut, num_processes)
            numbers |= {f"{name}: {what}": value for what, value in _differences(plain, cut).items()}
            assert numbers[f"{name}: loss"] < LOSS_TOLERANCE, numbers
            assert numbers[f"{name}: weight"] < WEIGHT_TOLERANCE, numbers
            yield numbers
    if num_gpus < 2:
        numbers["2 processes"] = f"left out: they need 2 GPUs, and {num_gpus} are seen here"
        yield numbers


def _differences(plain: Trained, cut: Trained) -> dict[str, float]:
    losses = [abs(one - other) for one, other in zip(plain.losses, cut.losses, strict=True)]
    weights, others = plain.weights(), cut.weights()
    farthest = max(float((weight - others[name]).abs().max()) for name, weight in weights.items())
    return {"loss": max(losses), "weight": farthest}


def _num_cut(run: Trained, num_processes: int) -> int:
    """Return how many weights lay cut up in every process between two passes; check the matrices, which must."""
    sizes: list[list[int]] = []
    for rank in range(num_processes):
        held = json.loads((run.folder / f"held-{rank}.json").read_text())
        sizes = [size for size in held.values() if size[0] > PERSISTENCE_THRESHOLD]
        assert sizes and all(now == 0 and share == -(-whole // num_processes) for whole, now, share in sizes), held
    return len(sizes)

"""Training jobs of random pairs, run by torchrun as a launcher runs them, and what they leave."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.torch import load_file
from torch import Tensor

from dice_core.data.records import PAIRS, write_table
from dice_core.launch.settings import LaunchConfig
from dice_core.launch.torchrun import TorchrunBackend
from dice_core.storage.manifest import require_manifest
from dice_core.training.job import TrainingJob
from dice_core.training.settings import TrainingConfig
from tests.gpu.models import NUM_SPECIAL


@dataclass(frozen=True)
class Trained:
    """What a job left."""

    folder: Path
    metrics: Mapping[str, Any]
    losses: list[float]

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights."""
        return {name: weight for path in self.folder.glob("*.safetensors") for name, weight in load_file(path).items()}


def write_pairs(path: Path, *, num_pairs: int, num_tokens: int, vocabulary: int) -> None:
    """Write pairs of random tokens: prompts of up to so many, responses of up to so many."""
    rng = np.random.default_rng(3)

    def tokens() -> list[int]:
        return rng.integers(NUM_SPECIAL, vocabulary, rng.integers(num_tokens // 2, num_tokens + 1)).tolist()

    texts = {"prompt": "a question", "chosen": "a good answer", "rejected": "a bad answer"}
    rows = [
        {
            "prompt_id": f"prompt-{number}",
            **texts,
            **{f"{name}_token_ids": tokens() for name in texts},
            "source": "generated",
            "split": "train",
        }
        for number in range(num_pairs)
    ]
    write_table(pa.Table.from_pylist(rows, PAIRS), PAIRS, path)


def train(
    folder: Path, policy: Path, pairs: Path, worker: str, num_processes: int, settings: Mapping[str, Any]
) -> Trained:
    """Run a job.

    Args:
        folder: for its output.
        policy: folder of the model.
        pairs: file of write_pairs.
        worker: module that torchrun starts.
        num_processes: of this machine.
        settings: of training.

    Raises:
        LaunchError: it failed.
    """
    training = TrainingConfig.parse(dict(settings), "training")
    fields = {"stage": "train", "fingerprint": training.fingerprint()}
    job = TrainingJob(str(folder), str(policy), str(pairs), training, seed=1, manifest_fields=fields)
    TorchrunBackend(worker).run(job.write(), LaunchConfig(processes_per_node=num_processes))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = require_manifest(str(folder)).metrics
    return Trained(folder, metrics, [line["loss"] for line in lines if "loss" in line])

"""What is wrong with a job's pairs and its model's length, told before its processes are started. Loads no torch.

The processes check the same: they may run on other machines, and later.
"""

import json
from pathlib import Path

from dice_core.storage.address import open_storage
from dice_core.training.job import TrainingJob
from dice_core.training.worker import check_context, load_pairs

_CONFIG = "config.json"


def check_job(job: TrainingJob, folder: Path) -> None:
    """Read a job's pairs as its processes will.

    Args:
        job: to start.
        folder: for the file of pairs.

    Raises:
        StorageError: the pairs are not there, or not those of their manifest.
        RecordError: no pair can be trained on.
        ConfigError: the longest pair has more tokens than the model has positions.
    """
    pairs = load_pairs(job, folder)
    if num_positions := _num_positions(job.policy_uri):
        check_context(job, pairs, num_positions)


def _num_positions(model_uri: str) -> int:
    """Return for how many tokens a model has positions; 0 where its config does not say it in the usual way."""
    config = json.loads(open_storage(model_uri).read_bytes(_CONFIG))
    found = config.get("text_config", config).get("max_position_embeddings")
    return found if isinstance(found, int) else 0

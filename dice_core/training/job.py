"""The record of a training job, which launch writes and every training process reads. Loads no torch."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from dice_core.progress import log
from dice_core.settings.base import ConfigError
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.stored_record import read_record
from dice_core.training.settings import TrainingConfig

JOB_FILE = "job.json"
CHECKPOINTS = "checkpoints"
ERROR, FINAL_ERROR = "error: ", "final error: "
"""How a process of training begins a line for a person. A final error is met by every other try too: the pairs, the
settings or the model have to change. Others may pass, as those of the storage."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything a training process needs to know, as one JSON file in storage."""

    output_uri: str
    policy_uri: str
    pairs_uri: str
    """A pair stage's place, or the address of a Parquet file (records.PAIRS)."""
    training: TrainingConfig
    seed: int
    reference_uri: str = ""
    """The model that is the reference, where it is not the policy as it starts."""
    manifest_fields: Mapping[str, Any] = field(default_factory=dict)
    """stage, fingerprint, settings and inputs of the manifest to publish."""
    section: str = "training"
    """What a person calls these settings: a run's warm start has a section of its own."""

    def write(self) -> str:
        """Store the job at its output's place, and return its URI."""
        values = {**asdict(self), "training": self.training.to_dict()}
        open_storage(self.output_uri).write_bytes(JOB_FILE, json.dumps(values, indent=1).encode())
        return layout.join(self.output_uri, JOB_FILE)

    @classmethod
    def read(cls, job_uri: str) -> Self:
        """Read a stored job.

        Raises:
            StorageError: there is none, or it is not one.
            ConfigError: its settings are not valid; another try would not help.
        """
        parent, _, name = job_uri.rpartition("/")
        data = open_storage(parent or ".").read_bytes(name)
        try:
            values = json.loads(data)
            TrainingConfig.parse(values["training"], values.get("section", "training"))
            return read_record(cls, data, job_uri)
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{job_uri}: not a training job: {error}") from None

    @property
    def fingerprint(self) -> str:
        """The identity of its result; checkpoints of another fingerprint are not resumed from."""
        return str(self.manifest_fields.get("fingerprint", ""))

    def scratch_folder(self) -> Path:
        """Return where this job works on this machine: the same after a restart, another for another job.

        Below DICE_SCRATCH, or ~/.cache/dice: never in the model cache, which machines may share.
        """
        root = os.environ.get("DICE_SCRATCH") or Path.home() / ".cache" / "dice"
        name = sha256(f"{self.output_uri}\n{self.fingerprint}".encode()).hexdigest()[:16]
        return Path(root) / "training" / name


def delete_leftovers(output_uri: str) -> None:
    """Delete what a training that was stopped after it had published did not come to delete.

    That is its checkpoints in storage, for a large model hundreds of gigabytes, and its scratch folder on this machine.
    For a finished output only: it ends every chance to resume.

    Raises:
        StorageError: the storage failed, or its job cannot be read.
    """
    num_deleted = open_storage(layout.join(output_uri, CHECKPOINTS)).delete("")
    if num_deleted:
        log(f"train: {num_deleted} files of checkpoints deleted below {output_uri}")
    storage = open_storage(output_uri)
    if any(entry.key == JOB_FILE for entry in storage.list(JOB_FILE)):
        shutil.rmtree(TrainingJob.read(layout.join(output_uri, JOB_FILE)).scratch_folder(), ignore_errors=True)

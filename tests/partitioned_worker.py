"""A process of training whose every matrix ZeRO-3 cuts up, as those of a real model: `-m tests.partitioned_worker JOB`.

DeepSpeed keeps weights below a threshold whole in every process, and all layers of a test model are below it. Here the
threshold is lower, all else is the worker's. What each process holds of the weights is written beside the job.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from dice_core.training import arguments, trainer
from dice_core.training.settings import TrainingConfig

PERSISTENCE_THRESHOLD = 1000
"""Elements: the smallest matrix of the tiny model has twice as many, its norms have 64."""
_given_config = arguments.deepspeed_config


def _cutting_config(config: TrainingConfig, num_processes: int) -> dict[str, Any] | None:
    given = _given_config(config, num_processes)
    if given:
        given["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENCE_THRESHOLD
    return given


class _Recording(trainer.DPOTrainer):
    """Writes how the weights lie between two passes: of each its elements, those held here, those of its own share."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = {
            name: [weight.ds_numel, weight.numel(), weight.ds_tensor.numel()]
            for name, weight in self.policy.named_parameters()
        }
        path = Path(sys.argv[1]).with_name(f"held-{os.environ['RANK']}.json")
        if not path.exists():
            path.write_text(json.dumps(found))
        return super().compute_loss(*args, **kwargs)


if __name__ == "__main__":
    arguments.deepspeed_config = _cutting_config
    trainer.DPOTrainer = _Recording
    runpy.run_module("dice_core.training.worker", run_name="__main__")

"""A process of training that writes how long it stands still for each checkpoint: `-m tests.timed_worker JOB`.

From where the trainer begins to save to where the next step can begin. All else is the worker's.
"""

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dice_core.training import trainer


class _Timed(trainer.DPOTrainer):
    """Measures around `_maybe_log_save_evaluate` of a step that saves; such a step measures no pairs in these tests."""

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        is_saving = self.control.should_save
        if is_saving and torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = super()._maybe_log_save_evaluate(*args, **kwargs)
        if is_saving:
            _seconds.append(time.perf_counter() - start)
            Path(sys.argv[1]).with_name("stood-still.json").write_text(json.dumps(_seconds))
        return result


_seconds: list[float] = []

if __name__ == "__main__":
    trainer.DPOTrainer = _Timed
    runpy.run_module("dice_core.training.worker", run_name="__main__")

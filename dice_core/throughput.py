"""How fast training goes and what memory it takes: lines in the log while it runs, totals at its end."""

import resource
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dice_core import processes
from dice_core.manifest import Metric
from dice_core.progress import Throttle, log

if TYPE_CHECKING:
    from dice_core.dpo_trainer import DPOTrainer


class Speedometer(TrainerCallback):
    """Measures tokens per second over training steps alone: reference pass, evaluation and checkpoints do not count."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self._throttle = Throttle(5.0)
        self._seconds, self._step_start, self._num_steps = 0.0, 0.0, 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock of a step."""
        self._step_start = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock of a step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds += time.monotonic() - self._step_start
        self._num_steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Print a line of training, at most one in five seconds, and every evaluation."""
        values = logs or {}
        prefix = "" if "loss" in values else "eval_"
        is_last = state.global_step >= state.max_steps
        if f"{prefix}loss" not in values or not state.is_world_process_zero:
            return
        if prefix or is_last or self._throttle.is_due():
            log(
                f"train: step {state.global_step} of {state.max_steps}{' (eval pairs)' if prefix else ''}: "
                f"loss {values[f'{prefix}loss']:.4f}, reward accuracy {values[f'{prefix}rewards/accuracies']:.2f}, "
                f"margin {values[f'{prefix}rewards/margins']:.4f}"
            )

    def totals(self, trainer: "DPOTrainer") -> dict[str, Metric]:
        """Return tokens_per_second, peak_memory_bytes (largest process) and, on GPUs, mfu. Every process calls it."""
        num_tokens = sum(processes.gather(trainer.num_trained_tokens))
        rate = num_tokens / self._seconds if self._seconds else 0.0
        metrics: dict[str, Metric] = {
            "tokens_per_second": round(rate, 1),
            "seconds_per_step": round(self._seconds / max(self._num_steps, 1), 3),
            "peak_memory_bytes": max(processes.gather(_peak_memory_bytes())),
            "num_processes": processes.num_processes(),
        }
        if torch.cuda.is_available():
            # 6 operations a weight and token (forward 2, backward 4); recomputed activations do not count.
            done = 6 * _num_weights(trainer) * rate
            metrics["mfu"] = round(done / (processes.num_processes() * matmul_peak()), 4)
        return metrics


def matmul_peak(size: int = 8192, repeats: int = 10) -> float:
    """Return this GPU's measured bfloat16 matrix-multiplication speed, operations per second."""
    left, right = (torch.randn(size, size, device=processes.device(), dtype=torch.bfloat16) for _ in range(2))
    left @ right
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.monotonic() - start)


def _num_weights(trainer: "DPOTrainer") -> int:
    # Under ZeRO-3 a parameter holds no elements of its own; ds_numel is the whole one's.
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in trainer.policy.parameters())


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""An exponential moving average of the weights, kept beside training and saved in place of the last weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FILE = "ema.safetensors"


class WeightAverage(TrainerCallback):
    """average = decay x average + (1 - decay) x weights after each step, from the weights of the start, in float32.

    Each process keeps the whole: settings refuse it where weights are sharded.
    """

    def __init__(
        self, decay: float, resume_folder: Path | None, stage: Callable[[Mapping[str, Tensor], Path], None]
    ) -> None:
        """Take the decay, the checkpoint that training goes on from, and what puts tensors into a checkpoint."""
        self._decay, self._resume_folder, self._stage = decay, resume_folder, stage
        self._average: dict[str, Tensor] = {}  # by name, each of its weight's shape

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the weights of now, or from the checkpoint's average."""
        saved = load_file(self._resume_folder / _FILE) if self._resume_folder else {}
        for name, weight in _weights(kwargs["model"]):
            self._average[name] = saved[name].to(weight.device) if saved else weight.detach().float().clone()

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the average towards the weights of this step."""
        for name, weight in _weights(kwargs["model"]):
            self._average[name].lerp_(weight.float(), 1 - self._decay)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the average into the checkpoint."""
        if args.should_save:
            self._stage(self._average, Path(args.output_dir or "") / f"checkpoint-{state.global_step}" / _FILE)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights with the average."""
        for name, weight in _weights(model):
            weight.copy_(self._average[name])


def _weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]

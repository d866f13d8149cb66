"""From trained, perhaps sharded, weights to a finished model folder: collected, compared, saved, checked.

This module brings the weights together in float32; `models/saving.py` writes and verifies the files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dice_core.models.files import ModelError, shard_names
from dice_core.models.loading import load_model
from dice_core.models.saving import save_model
from dice_core.settings.base import DType


@dataclass(frozen=True)
class WeightChange:
    """How far training moved the weights, and how much of that the saved dtype keeps."""

    relative_update: float
    """Norm of the change over the norm of the weights it began with."""
    rounding_loss: float
    """Norm of what rounding to the saved dtype moves, over the norm of the change: 0 loses nothing, 1 about all."""
    num_parameters: int
    """Of the model."""


class ExactMasterWeights(TrainerCallback):
    """Gives DeepSpeed's float32 master copy the exact weights of the policy.

    With bf16 DeepSpeed loads weights in bfloat16 and makes its master copy from those: a policy saved in float32 would
    lose what made it differ from the one before.
    """

    def __init__(self, policy_folder: Path) -> None:
        """Take the model training begins with."""
        self._folder = policy_folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Overwrite the master copy, one parameter at a time; a resumed run has it from its checkpoint."""
        if state.global_step:
            return
        from deepspeed.utils import safe_set_full_fp32_param

        parameters = dict(kwargs["model"].policy.named_parameters())
        for shard in shard_names(self._folder):
            with safe_open(self._folder / shard, framework="pt") as weights:
                # Names the model does not have are second names of shared weights.
                for name in sorted(parameters.keys() & set(weights.keys())):
                    weight = weights.get_tensor(name)
                    if weight.dtype == torch.float32:
                        safe_set_full_fp32_param(parameters[name], weight)


def gather_weights(parameters: Mapping[str, nn.Parameter], *, uses_deepspeed: bool, keep: bool) -> dict[str, Tensor]:
    """Collect whole float32 weights on the CPU. Every process must call it.

    Args:
        parameters: that were trained, by name.
        uses_deepspeed: weights are taken from its optimizer's float32 copy, one parameter at a time.
        keep: whether this process wants them; the others get an empty dict.

    Returns:
        Weights by name, each of its whole shape; a weight that two modules share is there once.

    Raises:
        ModelError: DeepSpeed holds no float32 copy of a parameter.
    """
    weights = {}
    for name, parameter in parameters.items():
        whole = _whole(name, parameter) if uses_deepspeed else parameter.detach()
        if keep:
            weights[name] = whole.to("cpu", torch.float32, copy=True)
    return weights


def _whole(name: str, parameter: nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    whole: Tensor | None = safe_get_full_fp32_param(parameter)
    if whole is None:
        raise ModelError(f"parameter {name}: DeepSpeed holds no float32 copy of it, so it cannot be saved")
    return whole


def save_trained_model(
    weights: Mapping[str, Tensor],
    policy_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: DType,
) -> WeightChange:
    """Write the finished model as safetensors, and verify what was written.

    Args:
        weights: from gather_weights.
        policy_folder: the model training began with: gives the configuration, and the weights to compare with.
        tokenizer: saved beside it.
        folder: gets the files.
        dtype: of the saved weights.

    Raises:
        ModelError: a weight is missing, of another shape, or not finite, or the files do not read back.
    """
    model = load_model(policy_folder, "float32")
    change = replace_weights(model, weights, dtype)
    save_model(model, tokenizer, folder, dtype)
    return change


def replace_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], saved_dtype: DType) -> WeightChange:
    """Give a model with the weights of the start its trained ones, and measure the change.

    Raises:
        ModelError: as weight_change.
    """
    change = weight_change(dict(model.named_parameters()), weights, saved_dtype)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    return change


def weight_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor], saved_dtype: DType) -> WeightChange:
    """Measure the update, and what rounding to the saved dtype takes from it.

    Raises:
        ModelError: the weights do not belong to one model, or are not finite.
    """
    dtype = torch.bfloat16 if saved_dtype == "bfloat16" else torch.float32
    lost = changed = size = 0.0
    num_parameters = sum(weight.numel() for weight in before.values())
    for name, start in before.items():
        end = after.get(name)
        if end is None or end.shape != start.shape:
            raise ModelError(f"trained weight {name}: must have shape {tuple(start.shape)}, got {_shape(end)}")
        if not torch.isfinite(end).all():
            raise ModelError(f"trained weight {name}: has values that are not finite; the model is not published")
        lost += _square_sum(end.to(dtype).float() - end)
        changed += _square_sum(end - start.detach())
        size += _square_sum(start.detach())
    if not changed:
        return WeightChange(0.0, 0.0, num_parameters)
    return WeightChange((changed / size) ** 0.5, (lost / changed) ** 0.5, num_parameters)


def _shape(weight: Tensor | None) -> str:
    return "none" if weight is None else str(tuple(weight.shape))


def _square_sum(values: Tensor) -> float:
    return float(values.double().square().sum())

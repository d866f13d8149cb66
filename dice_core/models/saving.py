"""A model in memory, saved as a verified folder of safetensors."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dice_core.models.files import (
    CONFIG,
    read_config,
    verify_model_folder,
)
from dice_core.models.generation_config import savable
from dice_core.settings.base import DType

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_SHARD_SIZE = "5GB"


def save_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, dtype: DType) -> None:
    """Save a whole model as safetensors in a dtype, with config and tokenizer, and verify what was written.

    Args:
        model: unsharded; its own weights stay as they are.
        tokenizer: of the model.
        folder: is made if it does not exist.
        dtype: of the saved weights.

    Raises:
        ModelError: what was written is not a whole model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = savable(model.generation_config)
    use_cache, model.config.use_cache = model.config.use_cache, True
    model.save_pretrained(folder, state_dict=_converted(model, dtype), max_shard_size=_SHARD_SIZE)
    model.config.use_cache = use_cache
    tokenizer.save_pretrained(folder)
    # transformers wrote the dtype that the model has in memory.
    config = read_config(folder)
    (folder / CONFIG).write_text(json.dumps({**config, "dtype": dtype}, indent=2))
    verify_model_folder(folder)


def _converted(model: "PreTrainedModel", dtype: DType) -> "dict[str, torch.Tensor]":
    """Return the weights in a dtype; those that two modules share stay one tensor, or they would be saved twice."""
    import torch

    converted: dict[tuple[int, torch.Size], torch.Tensor] = {}
    weights = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            identity = (value.data_ptr(), value.shape)
            if identity not in converted:
                converted[identity] = value.to(getattr(torch, dtype))
            value = converted[identity]
        weights[name] = value
    return weights

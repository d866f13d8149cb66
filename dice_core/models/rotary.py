"""Rotary positions of a model: whether neighbours change them, and what keeps them exact while it trains.

`logprobs/packing.py` gives a packed row its positions.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from dice_core.models.files import ModelError

# Frequencies that are the same for every sequence.
_FIXED_ROPES = {None, "default", "linear", "llama3", "yarn"}
# They depend on the longest sequence of a batch, and on nothing that came before.
_BATCH_ROPES = {"longrope"}


def stretches_positions(model: PreTrainedModel) -> bool:
    """Return whether rotary positions depend on the longest sequence of a batch: then neighbours change log-probs.

    So they do in every way that is not known to be the same for all sequences.
    """
    return not _rope_types(model) <= _FIXED_ROPES


def reset_positions(model: PreTrainedModel) -> None:
    """Let a model forget the sequences before: its next one then has the positions that it has in a fresh model.

    transformers keeps what it computed for the longest sequence so far (`dynamic`, scaling by NTK), and a shorter one
    gets that too. Where nothing is kept, nothing is done.

    Raises:
        ModelError: the model keeps it in a way that is not known here.
    """
    if not _rope_types(model) <= _FIXED_ROPES | _BATCH_ROPES and not restore_frequencies(model):
        types = ", ".join(sorted(map(str, _rope_types(model))))
        raise ModelError(
            f"{model.config.model_type}: its rotary positions ({types}) depend on the sequences before in a way "
            "that is not known here: log-probs would depend on their order"
        )


def _rope_types(model: PreTrainedModel) -> set[str | None]:
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # One for all layers, or one for each type of layer.
    each = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {rope.get("rope_type") for rope in each}


def restore_frequencies(model: PreTrainedModel) -> int:
    """Make the rotary frequencies anew, in float32, as every other loader of the model has them.

    transformers builds a model for ZeRO-3 inside DeepSpeed's zero.Init, which rounds what is computed there to the
    dtype of training. In bfloat16 a frequency is off by up to 0.4 %: after 2,000 tokens that is most of a turn, and the
    model that is trained is not the one that is scored, sampled from and published. Call it outside of zero.Init.

    Returns:
        How many modules were made anew.
    """
    found = [(name, module) for name, module in model.named_modules() if _is_rotary(module)]
    for name, module in found:
        device = next(module.buffers()).device
        model.set_submodule(name, type(module)(module.config).to(device))
    return len(found)


def require_finite_frequencies(model: PreTrainedModel, where: str) -> None:
    """Check that a config gives rotary frequencies that are numbers: a base of -1 gives none. No weights are needed.

    Args:
        model: on any device, the meta device too.
        where: what a message calls its config.

    Raises:
        ModelError: a frequency is not finite.
    """
    for name, module in model.named_modules():
        if _is_rotary(module):
            made = type(module)(module.config)
            if not all(torch.isfinite(frequencies).all() for frequencies in made.buffers()):
                raise ModelError(
                    f"{where}: its rotary positions ({name}) have frequencies that are no finite numbers: correct "
                    "rope_theta and the scaling beside it"
                )


def _is_rotary(module: nn.Module) -> bool:
    """Return whether a module is what transformers makes of a configuration: frequencies, no weights."""
    return type(module).__name__.endswith("RotaryEmbedding") and hasattr(module, "config")

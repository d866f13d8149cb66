"""Rotary positions of a model: whether neighbours change them, and what keeps them exact while it trains.

`logprobs/packing.py` gives a packed row its positions.
"""

from torch import nn
from transformers import PreTrainedModel

_BATCH_ROPES = {"dynamic", "longrope"}


def stretches_positions(model: PreTrainedModel) -> bool:
    """Return whether rotary positions depend on the longest sequence of a batch: then neighbours change log-probs."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # One for all layers, or one for each type of layer.
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(rope.get("rope_type") in _BATCH_ROPES for rope in each)


def restore_frequencies(model: PreTrainedModel) -> None:
    """Make the rotary frequencies anew, in float32, as every other loader of the model has them.

    transformers builds a model for ZeRO-3 inside DeepSpeed's zero.Init, which rounds what is computed there to the
    dtype of training. In bfloat16 a frequency is off by up to 0.4 %: after 2,000 tokens that is most of a turn, and the
    model that is trained is not the one that is scored, sampled from and published. Call it outside of zero.Init.
    """
    for name, module in list(model.named_modules()):
        if _is_rotary(module):
            device = next(module.buffers()).device
            model.set_submodule(name, type(module)(module.config).to(device))


def _is_rotary(module: nn.Module) -> bool:
    """Return whether a module is what transformers makes of a configuration: frequencies, no weights."""
    return type(module).__name__.endswith("RotaryEmbedding") and hasattr(module, "config")

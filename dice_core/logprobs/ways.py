"""Which way prompt groups take through a model: by what its code tells and a few tokens show.

Two kernels on a GPU, each for what it can do. FlexAttention, a part of torch, runs packed rows: it alone takes the mask
of a prompt that several responses share. flash-attn knows causal attention and windows only, and takes no mask: it runs
the models whose responses go in rows of their own, where it is installed. Elsewhere torch's SDPA runs everything.

`attention.py` has the masks and the kernels, `compiled.py` sees that FlexAttention is compiled, and `trial.py` tries a
model on a few tokens.
"""

import inspect
import warnings
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from dice_core.logprobs.attention import BLOCK, MAKES_WINDOWS, SEGMENTS, mask_makers
from dice_core.logprobs.compiled import FLEX, use_flex_attention
from dice_core.logprobs.packing import Row, padded
from dice_core.logprobs.trial import mask_fault
from dice_core.models.rotary import stretches_positions

Way = Literal["flex", "segments", "dense", "separate"]

_MASKED_LAYERS = {"full_attention", "sliding_attention"}
_MASKED_ATTENTIONS = {"sdpa", "eager", FLEX, SEGMENTS}
# What tells a model's layers who sees whom, and is replaced by a mask of ours. (GPT-2 has the third for the states of
# an encoder, which it does not get.) Under masks of other makers a token may see more or less than a prompt and itself.
_MASK_MAKERS = {"create_causal_mask", MAKES_WINDOWS, "create_bidirectional_mask"}
# What flash-attn 2 has kernels for: Ampere, Ada and Hopper, 16 bits, heads of up to 256.
_FLASH_GENERATIONS, _FLASH_DTYPES, _FLASH_HEAD_SIZE = {8, 9}, {torch.bfloat16, torch.float16}, 256


def packed_way(model: PreTrainedModel) -> Way:
    """Return how prompt groups run through a model; it is switched to that way's attention where that is another.

    `flex` is FlexAttention, which skips the empty blocks of a mask and needs a GPU; `segments` runs prompts and
    responses one by one through SDPA, within rows that all else runs through whole; `dense` is a mask of all tokens by
    all tokens, for a model that is set to eager attention; `separate` repeats the prompt for each response, for models
    that cannot be masked by (prompt, response), warns, and takes flash-attn where it can. Measured on a CPU in float32:
    `segments` takes 0.93 of the time of a cached prompt with batches of its responses, and with gradient 0.9 of that of
    a dense mask.
    """
    reason = unmaskable(model) or mask_fault(model)
    if reason:
        warnings.warn(
            f"{model.config.model_type}: {reason}, so each response runs in a row of its own with its prompt: "
            "the results are the same, only slower",
            stacklevel=2,
        )
        _use_flash_attention(model)
        return "separate"
    if model.config._attn_implementation in ("sdpa", SEGMENTS):
        if model.device.type == "cuda" and model._supports_flex_attn:
            use_flex_attention(model)
        else:
            model.set_attn_implementation(SEGMENTS)
    ways: dict[str, Way] = {FLEX: "flex", SEGMENTS: "segments"}
    return ways.get(model.config._attn_implementation, "dense")


def unmaskable(model: PreTrainedModel) -> str:
    """Return why a model cannot see rows of prompt groups through a mask; empty if it can."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _MASKED_LAYERS
    if model._is_stateful or others:
        return f"its layers ({', '.join(sorted(others)) or 'stateful'}) are not all attention"
    if not _masks_are_known(model):
        return "it makes its masks in a way of its own"
    if "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        return "it takes no positions"
    if stretches_positions(model):
        return "its positions depend on the longest sequence of the batch"
    if not model._supports_attention_backend or model.config._attn_implementation not in _MASKED_ATTENTIONS:
        return "its attention takes no mask of ours"
    if layers := _layers_with_masks(model):
        return f"its layers ({', '.join(layers)}) make masks of their own"
    return ""


def _masks_are_known(model: PreTrainedModel) -> bool:
    """Return whether the model asks for the masks of all its layers by functions that a mask of ours stands for."""
    makers = mask_makers(model)
    return bool(makers) and makers <= _MASK_MAKERS


def _layers_with_masks(model: PreTrainedModel) -> list[str]:
    """Return the kinds of layers that call something of masks, such as Doge's, which choose what is seen as they run.

    Filling in a mask is no such thing: it is how routers choose among experts.
    """
    decoder = model.get_decoder()
    kinds = {type(module) for module in decoder.modules() if module is not decoder}
    return sorted(kind.__name__ for kind in kinds if any(map(_is_of_masks, _called(kind))))


def _called(kind: type[nn.Module]) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code.co_names if code else ()


def _is_of_masks(name: str) -> bool:
    return "mask" in name and not name.startswith("masked_fill")


def takes_flash_attention(
    *,
    attention: str,
    is_supported: bool,
    is_installed: bool,
    generation: int | None,
    dtype: torch.dtype,
    head_size: int | None,
) -> bool:
    """Return whether a model that runs in separate rows is switched to flash-attn.

    Args:
        attention: what it has now; only SDPA, transformers' or ours, is replaced.
        is_supported: transformers has it for this model.
        is_installed: the package is there.
        generation: of the GPU: the first number of its compute capability; None on a CPU.
        dtype: of the weights.
        head_size: of an attention head; None where the model does not say.
    """
    has_kernel = generation in _FLASH_GENERATIONS and dtype in _FLASH_DTYPES
    has_kernel = has_kernel and head_size is not None and head_size <= _FLASH_HEAD_SIZE
    return attention in ("sdpa", SEGMENTS) and is_supported and is_installed and has_kernel


def _use_flash_attention(model: PreTrainedModel) -> None:
    if model.device.type != "cuda":
        return
    config = model.config.get_text_config()
    size, num_heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    head_size = getattr(config, "head_dim", None) or (size // num_heads if size and num_heads else None)
    if takes_flash_attention(
        attention=model.config._attn_implementation,
        # transformers refuses a bias by distance only when it runs.
        is_supported=model._supports_flash_attn and not getattr(config, "alibi", False),
        is_installed=is_flash_attn_2_available(),
        generation=torch.cuda.get_device_capability(model.device)[0],
        dtype=model.dtype,
        head_size=head_size,
    ):
        model.set_attn_implementation("flash_attention_2")


def filled(row: Row, way: Way) -> Row:
    """Return the row, for FlexAttention filled up to whole blocks."""
    return padded(row, -(-len(row.input_ids) // BLOCK) * BLOCK) if way == "flex" else row

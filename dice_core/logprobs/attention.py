"""How a model attends over packed rows: which way it can take, and what tells its layers who sees whom.

Two kernels on a GPU, each for what it can do. FlexAttention, a part of torch, runs packed rows: it alone takes the mask
of a prompt that several responses share. flash-attn knows causal attention and windows only, and takes no mask: it runs
the models whose responses go in rows of their own, where it is installed. Elsewhere torch's SDPA runs everything.

Rows come from `packing.py`; `forward.py` runs the model.
"""

import inspect
import warnings
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

from dice_core.logprobs.packing import Row, padded, windowed
from dice_core.models.rotary import stretches_positions

Mask = Tensor | BlockMask
Way = Literal["flex", "segments", "dense", "separate"]

BLOCK = 128
_MASKED_LAYERS = {"full_attention", "sliding_attention"}
_SEGMENTS = "dice_segments"
_MASKED_ATTENTIONS = {"sdpa", "eager", "flex_attention", _SEGMENTS}
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
    reason = unmaskable(model)
    if reason:
        warnings.warn(
            f"{model.config.model_type}: {reason}, so each response runs in a row of its own with its prompt: "
            "the results are the same, only slower",
            stacklevel=2,
        )
        _use_flash_attention(model)
        return "separate"
    if model.config._attn_implementation == "sdpa":
        has_flex = model.device.type == "cuda" and model._supports_flex_attn
        model.set_attn_implementation("flex_attention" if has_flex else _SEGMENTS)
    ways: dict[str, Way] = {"flex_attention": "flex", _SEGMENTS: "segments"}
    return ways.get(model.config._attn_implementation, "dense")


def unmaskable(model: PreTrainedModel) -> str:
    """Return why a model cannot see rows of prompt groups through a mask; empty if it can."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _MASKED_LAYERS
    if model._is_stateful or others:
        return f"its layers ({', '.join(sorted(others)) or 'stateful'}) are not all attention"
    if "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        return "it takes no positions"
    if stretches_positions(model):
        return "its positions depend on the longest sequence of the batch"
    if not model._supports_attention_backend or model.config._attn_implementation not in _MASKED_ATTENTIONS:
        return "its attention takes no mask of ours"
    return ""


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
        attention: what it has now; only SDPA, nobody's choice, is replaced.
        is_supported: transformers has it for this model.
        is_installed: the package is there.
        generation: of the GPU: the first number of its compute capability; None on a CPU.
        dtype: of the weights.
        head_size: of an attention head; None where the model does not say.
    """
    has_kernel = generation in _FLASH_GENERATIONS and dtype in _FLASH_DTYPES
    has_kernel = has_kernel and head_size is not None and head_size <= _FLASH_HEAD_SIZE
    return attention == "sdpa" and is_supported and is_installed and has_kernel


def _use_flash_attention(model: PreTrainedModel) -> None:
    config, on_gpu = model.config.get_text_config(), model.device.type == "cuda"
    size, num_heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    head_size = getattr(config, "head_dim", None) or (size // num_heads if size and num_heads else None)
    if takes_flash_attention(
        attention=model.config._attn_implementation,
        # transformers refuses a bias by distance only when it runs.
        is_supported=model._supports_flash_attn and not getattr(config, "alibi", False),
        is_installed=is_flash_attn_2_available(),
        generation=torch.cuda.get_device_capability(model.device)[0] if on_gpu else None,
        dtype=model.dtype,
        head_size=head_size,
    ):
        model.set_attn_implementation("flash_attention_2")


def attention_masks(model: PreTrainedModel, row: Row, dtype: torch.dtype) -> Mask | dict[str, Mask]:
    """Return what the model takes as attention_mask for a row.

    A model whose layers differ gets one mask for each type of layer; a sliding window counts positions, not places.

    Args:
        model: for which `unmaskable` has no reason.
        row: as `filled` leaves it.
        dtype: of the model's activations.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    is_out_of_window = window is not None and int(row.positions.max()) >= window
    if not is_out_of_window or types == {"full_attention"}:
        return _mask(model, row, None, dtype)
    sliding = _mask(model, row, window, dtype)
    if "full_attention" not in types:
        return sliding
    return {"full_attention": _mask(model, row, None, dtype), "sliding_attention": sliding}


def _mask(model: PreTrainedModel, row: Row, window: int | None, dtype: torch.dtype) -> Mask:
    if model.config._attn_implementation == _SEGMENTS:
        return segment_table(row, window)
    row = row if window is None else windowed(row, window)
    starts = torch.from_numpy(np.stack([row.own_starts, row.prompt_starts, row.prompt_ends])[:, None])  # (3, 1, tokens)
    if model.device.type == "cuda":
        # Pinned, so that a device at work on the row before is not waited for.
        starts = starts.pin_memory()
    own, prompt, end = starts.to(model.device, non_blocking=True)  # each (1, tokens)
    if model.config._attn_implementation == "flex_attention":
        return block_mask(own, prompt, end)
    visible = dense_mask(own, prompt, end)  # (1, 1, tokens, tokens)
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def segment_table(row: Row, window: int | None) -> Tensor:
    """Return the prompts and responses of a row, in order: what `segment_attention` takes for a mask.

    Shape: (1, 1, segments, 5), int64 on the CPU: start and end of the segment, start and end of its prompt (equal for
    a prompt itself), and the window, 0 without one. Four dimensions, because transformers hands on such masks as they
    are.
    """
    starts = np.flatnonzero(np.diff(row.own_starts, prepend=-1))  # (segments,)
    ends = np.append(starts[1:], len(row.own_starts))  # (segments,)
    columns = [starts, ends, row.prompt_starts[starts], row.prompt_ends[starts], np.full(len(starts), window or 0)]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.int64))[None, None]


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in a packed row segment by segment: each is the end of an ordinary causal sequence, its prompt and itself.

    With any mask but a table of segments it is SDPA, so that a model set to it can do all else too.

    Args:
        module: the layer.
        query: (1, heads, tokens, head size).
        key: likewise, with as many heads or fewer.
        value: as key.
        attention_mask: of segment_table.
        scaling: of the products.
        kwargs: of other ways of attention.

    Returns:
        (1, tokens, heads, head size), and no weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    outputs = []
    for start, end, prompt_start, prompt_end, window in attention_mask[0, 0].tolist():
        # Each (1, key heads, keys, head size).
        keys, values = (
            torch.cat([part[:, :, prompt_start:prompt_end], part[:, :, start:end]], dim=2) for part in (key, value)
        )
        seen = _causal(end - start, keys.shape[2], window, query.device)  # (queries, keys)
        options = {"is_causal": True} if seen is None else {"attn_mask": seen}
        is_grouped = query.shape[1] != key.shape[1]
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:end], keys, values, scale=scaling, enable_gqa=is_grouped, **options
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None  # (1, tokens, heads, head size)


def _causal(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor | None:
    """Return which keys the last tokens of a sequence see; None: SDPA's own causal mask says it. (queries, keys)."""
    if num_queries == num_keys and not 0 < window < num_keys:
        return None
    num_before = num_keys - num_queries
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(num_before)  # (queries, keys)
    return seen.triu_(num_before - window + 1) if window else seen


AttentionInterface.register(_SEGMENTS, segment_attention)
# What a plain forward of such a model takes.
AttentionMaskInterface.register(_SEGMENTS, sdpa_mask)


def dense_mask(own_starts: Tensor, prompt_starts: Tensor, prompt_ends: Tensor) -> Tensor:
    """Return which key each query sees. Arguments: (rows, tokens), see Row. Result: (rows, 1, tokens, tokens), bool."""
    places = torch.arange(own_starts.shape[1], device=own_starts.device)  # (tokens,)
    own, prompt, end = (starts[:, :, None] for starts in (own_starts, prompt_starts, prompt_ends))  # (rows, tokens, 1)
    in_own = (places >= own) & (places <= places[:, None])  # (rows, tokens, tokens): query, key
    return (in_own | ((places >= prompt) & (places < end)))[:, None]


def block_mask(own_starts: Tensor, prompt_starts: Tensor, prompt_ends: Tensor) -> BlockMask:
    """Return the same mask for FlexAttention. Arguments: (rows, tokens), see Row; tokens a multiple of BLOCK.

    Which blocks are empty, full or mixed is counted from the ranges: no [tokens x tokens] array is made.
    """
    num_tokens = own_starts.shape[1]
    places = torch.arange(num_tokens, device=own_starts.device)  # (tokens,)
    blocks = torch.arange(0, num_tokens, BLOCK, device=own_starts.device)  # (blocks,): where each begins
    own_ends = places.expand_as(own_starts) + 1  # (rows, tokens)
    num_visible = _overlap(own_starts, own_ends, blocks) + _overlap(prompt_starts, prompt_ends, blocks)
    by_block = num_visible.unflatten(1, (-1, BLOCK))  # (rows, query blocks, BLOCK, key blocks)
    is_full = by_block.amin(2) == BLOCK  # (rows, query blocks, key blocks)
    is_mixed = (by_block.amax(2) > 0) & ~is_full  # (rows, query blocks, key blocks)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_own = (key >= own_starts[row, query]) & (key <= query)
        return in_own | ((key >= prompt_starts[row, query]) & (key < prompt_ends[row, query]))

    return BlockMask.from_kv_blocks(
        *_listed(is_mixed), *_listed(is_full), BLOCK, visible, seq_lengths=(num_tokens, num_tokens)
    )


def _overlap(starts: Tensor, ends: Tensor, blocks: Tensor) -> Tensor:
    """Return how many places of [start, end) lie in each block. Result: (rows, tokens, blocks)."""
    low = torch.maximum(starts[:, :, None], blocks)  # (rows, tokens, blocks)
    return (torch.minimum(ends[:, :, None], blocks + BLOCK) - low).clamp_min(0)


def _listed(is_listed: Tensor) -> tuple[Tensor, Tensor]:
    """Turn (rows, query blocks, key blocks) flags into FlexAttention's counts and lists of key blocks, heads alike."""
    flags = is_listed[:, None].to(torch.int32)  # (rows, 1, query blocks, key blocks)
    return flags.sum(-1, dtype=torch.int32), flags.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def filled(row: Row, way: Way) -> Row:
    """Return the row, for FlexAttention filled up to whole blocks."""
    return padded(row, -(-len(row.input_ids) // BLOCK) * BLOCK) if way == "flex" else row

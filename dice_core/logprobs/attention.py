"""How a model attends over packed rows: what tells its layers who sees whom, and the kernels that heed it.

transformers hands its kernels whatever a model's attention has beside queries, keys and values (a soft cap, sinks, a
bias), and its SDPA drops without a word what it does not know. Here it is the other way round: only what is known to be
right is let through, for packed rows and for plain ones.

Rows come from `packing.py`; `ways.py` says which kernel a model takes, and `forward.py` runs it.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dice_core.logprobs.compiled import FLEX
from dice_core.logprobs.packing import Row, windowed
from dice_core.models.files import ModelError

Mask = Tensor | BlockMask

BLOCK = 128
SEGMENTS = "dice_segments"
"""Name of segment_attention among transformers' kernels."""
MAKES_WINDOWS = "create_sliding_window_causal_mask"
"""transformers' function for the mask of a sliding window."""
# What attention may be given and need not heed: the mask says it, or it is about caches and outputs.
_SAID_BY_MASK = {"sliding_window", "is_causal", "position_ids", "cache_position"}
_OF_OUTPUTS = {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
_NEED_NO_HEED = _SAID_BY_MASK | _OF_OUTPUTS


def use_checked_attention(model: PreTrainedModel) -> None:
    """Switch a model that is set to transformers' SDPA to the one below, which drops nothing without a word.

    What a kernel of a GPU, chosen later, would drop is found too: `trial.check_model` runs the model once before.
    """
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(SEGMENTS)


def mask_makers(model: PreTrainedModel) -> set[str]:
    """Return the names of the functions that make the masks of a model's layers."""
    code = getattr(inspect.unwrap(model.get_decoder().forward), "__code__", None)
    return {name for name in code.co_names if "create" in name and "mask" in name} if code else set()


def attention_masks(model: PreTrainedModel, row: Row, dtype: torch.dtype) -> Mask | dict[str, Mask]:
    """Return what the model takes as attention_mask for a row.

    A model whose layers differ gets one mask for each type of layer; a sliding window counts positions, not places.

    Args:
        model: for which `ways.unmaskable` has no reason.
        row: as `filled` leaves it.
        dtype: of the model's activations.
    """
    config = model.config.get_text_config()
    # A config may have a window that its model does not heed (Moshi).
    has_windows = MAKES_WINDOWS in mask_makers(model)
    window = getattr(config, "sliding_window", None) if has_windows else None
    types = set(getattr(config, "layer_types", None) or ())
    is_out_of_window = window is not None and int(row.positions.max()) >= window
    if not is_out_of_window or types == {"full_attention"}:
        return _mask(model, row, None, dtype)
    sliding = _mask(model, row, window, dtype)
    if "full_attention" not in types:
        return sliding
    return {"full_attention": _mask(model, row, None, dtype), "sliding_attention": sliding}


def _mask(model: PreTrainedModel, row: Row, window: int | None, dtype: torch.dtype) -> Mask:
    if model.config._attn_implementation == SEGMENTS:
        return segment_table(row, window)
    row = row if window is None else windowed(row, window)
    starts = torch.from_numpy(np.stack([row.own_starts, row.prompt_starts, row.prompt_ends])[:, None])  # (3, 1, tokens)
    if model.device.type == "cuda":
        # Pinned, so that a device at work on the row before is not waited for.
        starts = starts.pin_memory()
    own, prompt, end = starts.to(model.device, non_blocking=True)  # each (1, tokens)
    if model.config._attn_implementation == FLEX:
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
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in a packed row segment by segment: each is the end of an ordinary causal sequence, its prompt and itself.

    With any mask but a table of segments it attends as SDPA does, so that a model set to it can do all else too.

    Args:
        module: the layer.
        query: (1, heads, tokens, head size).
        key: likewise, with as many heads or fewer.
        value: as key.
        attention_mask: of segment_table.
        scaling: of the products.
        softcap: c, where products x become c * tanh(x / c), as in Gemma 2.
        kwargs: what else the model's attention has.

    Returns:
        (1, tokens, heads, head size), and no weights.

    Raises:
        ModelError: the model's attention has something that is not known here.
    """
    _refuse_unknown(module, kwargs)
    if attention_mask is None or attention_mask.dtype != torch.int64:
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return _heads_last(_softcapped(query, key, value, attention_mask, scaling, softcap)), None
    outputs = []
    for start, end, prompt_start, prompt_end, window in attention_mask[0, 0].tolist():
        # Each (1, key heads, keys, head size).
        keys, values = (
            torch.cat([part[:, :, prompt_start:prompt_end], part[:, :, start:end]], dim=2) for part in (key, value)
        )
        seen = _causal(end - start, keys.shape[2], window, query.device)  # (queries, keys)
        if softcap is not None:
            outputs.append(_softcapped(query[:, :, start:end], keys, values, seen, scaling, softcap))
            continue
        options = {"is_causal": True} if seen is None else {"attn_mask": seen}
        is_grouped = query.shape[1] != key.shape[1]
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:end], keys, values, scale=scaling, enable_gqa=is_grouped, **options
            )
        )
    return _heads_last(torch.cat(outputs, dim=2)), None


def _heads_last(attended: Tensor) -> Tensor:
    """Return (rows, tokens, heads, head size) in one piece of memory: some models make a view of it."""
    return attended.transpose(1, 2).contiguous()


def _refuse_unknown(module: torch.nn.Module, given: Mapping[str, Any]) -> None:
    """Raise ModelError if attention is given something that would be dropped."""
    unknown = [
        name for name, value in given.items() if value is not None and value is not False and name not in _NEED_NO_HEED
    ]
    if given.get("dropout") == 0:
        unknown.remove("dropout")
    if unknown:
        raise ModelError(
            f"{type(module).__name__}: its attention has {', '.join(sorted(unknown))}, which is not known here: "
            "log-probs of this model would be wrong"
        )


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Attend with capped products, which no kernel of SDPA does. Shapes as in segment_attention.

    Args:
        query: (rows, heads, queries, head size).
        key: (rows, heads or fewer, keys, head size).
        value: as key.
        mask: who is seen, bool, or what is added to products; None is causal. Broadcast to (rows, 1, queries, keys).
        scaling: of the products.
        softcap: see there.
    """
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    products = (query @ key.transpose(2, 3) * scaling / softcap).tanh() * softcap  # (rows, heads, queries, keys)
    if mask is None:
        num_before = key.shape[2] - query.shape[2]
        mask = torch.ones(products.shape[2:], dtype=torch.bool, device=query.device).tril_(num_before)
    if mask.dtype == torch.bool:
        # Not minus infinity: a row of padding sees nothing.
        products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    else:
        products = products + mask
    return products.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _causal(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor | None:
    """Return which keys the last tokens of a sequence see; None: SDPA's own causal mask says it. (queries, keys)."""
    if num_queries == num_keys and not 0 < window < num_keys:
        return None
    num_before = num_keys - num_queries
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(num_before)  # (queries, keys)
    return seen.triu_(num_before - window + 1) if window else seen


AttentionInterface.register(SEGMENTS, segment_attention)
# What a plain forward of such a model takes.
AttentionMaskInterface.register(SEGMENTS, sdpa_mask)


def dense_mask(own_starts: Tensor, prompt_starts: Tensor, prompt_ends: Tensor) -> Tensor:
    """Return which key each query sees. Arguments: (rows, tokens), see Row. Result: (rows, 1, tokens, tokens), bool."""
    places = torch.arange(own_starts.shape[1], device=own_starts.device)  # (tokens,)
    own, prompt, end = (starts[:, :, None] for starts in (own_starts, prompt_starts, prompt_ends))  # (rows, tokens, 1)
    in_own = (places >= own) & (places <= places[:, None])  # (rows, tokens, tokens): query, key
    return (in_own | ((places >= prompt) & (places < end)))[:, None]


class _RowMask(BlockMask):
    """A block mask that a model's layers take along to their devices.

    torch's moves its lists of blocks alone, and the function of its mixed blocks would read the ranges where they were.
    """

    ranges: tuple[Tensor, Tensor, Tensor]
    """Arguments of block_mask."""

    def to(self, device: torch.device | str) -> BlockMask:
        """Return the mask on a device; it is made there once for all layers."""
        device = torch.device(device)
        if device == self.kv_indices.device:
            return self
        made: dict[torch.device, BlockMask] = vars(self).setdefault("made", {})
        if device not in made:
            made[device] = block_mask(*(starts.to(device) for starts in self.ranges))
        return made[device]


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

    mask = _RowMask.from_kv_blocks(
        *_listed(is_mixed), *_listed(is_full), BLOCK, visible, seq_lengths=(num_tokens, num_tokens)
    )
    mask.ranges = (own_starts, prompt_starts, prompt_ends)
    return mask


def _overlap(starts: Tensor, ends: Tensor, blocks: Tensor) -> Tensor:
    """Return how many places of [start, end) lie in each block. Result: (rows, tokens, blocks)."""
    low = torch.maximum(starts[:, :, None], blocks)  # (rows, tokens, blocks)
    return (torch.minimum(ends[:, :, None], blocks + BLOCK) - low).clamp_min(0)


def _listed(is_listed: Tensor) -> tuple[Tensor, Tensor]:
    """Turn (rows, query blocks, key blocks) flags into FlexAttention's counts and lists of key blocks, heads alike."""
    flags = is_listed[:, None].to(torch.int32)  # (rows, 1, query blocks, key blocks)
    return flags.sum(-1, dtype=torch.int32), flags.argsort(dim=-1, descending=True, stable=True).to(torch.int32)

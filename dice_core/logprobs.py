"""Turns a model and token ids into log-probs of responses: the one place that scoring, training and evaluation call.

A prompt and its n responses are one row: positions restart after the prompt, and under the mask a response sees the
prompt and itself only, so a prompt is computed once for all its responses. The head is applied to the positions before
response tokens alone, in chunks that are recomputed in the backward pass: logits of [tokens x vocabulary] never exist.

Exact: equal to a plain forward of prompt + response, one at a time, up to float rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Progress = Callable[[int, int], None]

# Positions whose logits exist at one time: 256 x 128k vocabulary in float32 is 134 MB.
CHUNK_SIZE = 256


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and responses to it, as token ids; a response ends with its end-of-turn token."""

    prompt_token_ids: Sequence[int]
    responses: Sequence[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed row."""
        return len(self.prompt_token_ids) + sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class _Packed:
    """Groups as rows, padded on the right. B rows of L tokens with N response tokens in all."""

    input_ids: Tensor  # (B, L)
    position_ids: Tensor  # (B, L)
    segments: Tensor  # (B, L): 0 the prompt, 1.. its responses, -1 padding
    predictors: Tensor  # (N): index into the flattened (B * L) positions, of the position before each response token
    labels: Tensor  # (N)
    lengths: list[list[int]]  # tokens of each response of each group


def packed_token_logps(model: Any, groups: Sequence[PromptGroup], chunk_size: int = CHUNK_SIZE) -> list[list[Tensor]]:
    """Return the log-probs of every response token, with gradient where grad is enabled.

    Calls submodules of `model` (its decoder, then its head), so under DDP or DeepSpeed it belongs inside the forward of
    the wrapped module.

    Args:
        model: a causal language model of transformers.
        groups: prompts with their responses, one packed row each.
        chunk_size: positions whose logits exist at one time.

    Returns:
        For each group, for each response: float32 nats, shape (tokens of the response,).
    """
    packed = _pack(groups, next(model.parameters()).device)
    hidden = _hidden_states(model, packed).flatten(0, 1)[packed.predictors]  # (N, H)
    logps = _token_logps(model, hidden, packed.labels, chunk_size)
    flat = iter(logps.split([length for group in packed.lengths for length in group]))
    return [[next(flat) for _ in group] for group in packed.lengths]


@torch.no_grad()
def group_logps(
    model: Any, groups: Sequence[PromptGroup], *, tokens_per_batch: int, on_progress: Progress | None = None
) -> list[list[float]]:
    """Return the summed log-probs of every response, in nats, without gradient.

    Args:
        model: a causal language model of transformers.
        groups: prompts with their responses, in any order; the result has theirs.
        tokens_per_batch: rows x longest row of a batch; a longer row is a batch of its own.
        on_progress: called with groups done and groups in all.
    """
    results: list[list[float]] = [[] for _ in groups]
    num_done = 0
    for indices in _batches(groups, tokens_per_batch):
        for index, logps in zip(indices, packed_token_logps(model, [groups[i] for i in indices]), strict=True):
            results[index] = [response.double().sum().item() for response in logps]
        num_done += len(indices)
        if on_progress:
            on_progress(num_done, len(groups))
    return results


def _batches(groups: Sequence[PromptGroup], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield indices of groups of similar length, longest first: what does not fit shows at once."""
    batch: list[int] = []
    for index in sorted(range(len(groups)), key=lambda i: -groups[i].num_tokens):
        longest = groups[batch[0] if batch else index].num_tokens
        if batch and longest * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pack(groups: Sequence[PromptGroup], device: torch.device) -> _Packed:
    width = max(group.num_tokens for group in groups)
    input_ids = torch.zeros(len(groups), width, dtype=torch.long)
    position_ids = torch.zeros(len(groups), width, dtype=torch.long)
    segments = torch.full((len(groups), width), -1, dtype=torch.long)
    predictors: list[Tensor] = []
    for row, group in enumerate(groups):
        prompt_length, start = len(group.prompt_token_ids), len(group.prompt_token_ids)
        input_ids[row, :prompt_length] = torch.tensor(group.prompt_token_ids)
        position_ids[row, :prompt_length] = torch.arange(prompt_length)
        segments[row, :prompt_length] = 0
        for number, response in enumerate(group.responses, start=1):
            end = start + len(response)
            input_ids[row, start:end] = torch.tensor(response)
            position_ids[row, start:end] = torch.arange(prompt_length, prompt_length + len(response))
            segments[row, start:end] = number
            # The prompt's last position predicts the first token, each token the one after it.
            before = torch.cat([torch.tensor([prompt_length - 1]), torch.arange(start, end - 1)])
            predictors.append(row * width + before)
            start = end
    labels = torch.cat([torch.tensor(response) for group in groups for response in group.responses])
    tensors = (input_ids, position_ids, segments, torch.cat(predictors), labels)
    lengths = [[len(response) for response in group.responses] for group in groups]
    return _Packed(*(tensor.to(device) for tensor in tensors), lengths)


def _hidden_states(model: Any, packed: _Packed) -> Tensor:
    """Run the decoder without the head. Returns (B, L, H)."""
    dtype = next(model.parameters()).dtype
    if torch.is_autocast_enabled(packed.input_ids.device.type):
        dtype = torch.get_autocast_dtype(packed.input_ids.device.type)
    mask = _mask(packed, dtype)
    output = model.get_decoder()(
        input_ids=packed.input_ids, attention_mask=mask, position_ids=packed.position_ids, use_cache=False
    )
    return output.last_hidden_state


def _mask(packed: _Packed, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (B, 1, L, L): a token sees the prompt and its own segment, up to itself."""
    width = packed.segments.shape[1]
    query, key = packed.segments[:, :, None], packed.segments[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
    # Padding sees padding, so that no row of the mask is empty.
    visible = causal & ((query == key) | (key == 0))
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def _token_logps(model: Any, hidden: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    head = model.get_output_embeddings()

    def of_chunk(states: Tensor, wanted: Tensor) -> Tensor:
        return -functional.cross_entropy(head(states).float(), wanted, reduction="none")

    chunks = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([of_chunk(states, wanted) for states, wanted in chunks])
    return torch.cat([checkpoint(of_chunk, states, wanted, use_reentrant=False) for states, wanted in chunks])

"""The one place that turns a model and token ids into log-probs of responses: scoring, training and evaluation call it.

A prompt runs once for all its responses. Log-probs are taken at response positions only, from hidden states, in chunks
(`output_head.py`). `packing.py` lays responses out in rows, and `attention.py` says what each of their tokens sees.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dice_core.logprobs.attention import attention_masks, use_checked_attention
from dice_core.logprobs.output_head import target_logps
from dice_core.logprobs.packing import Piece, PromptGroup, Row, fill_rows, length_batches, pack_row, split_groups
from dice_core.logprobs.trial import check_model
from dice_core.logprobs.ways import filled, packed_way
from dice_core.models.rotary import reset_positions, stretches_positions

__all__ = ["PromptGroup", "group_logps", "packed_token_logps"]

# On a CPU longer rows are not faster and take more memory; a dense mask grows with their square.
_SHORT_ROW_TOKENS = 2048

# Which responses a batch holds, as (group, index in the group), and the log-probs of their tokens one after another.
Batch = tuple[list[tuple[int, int]], Tensor]


def packed_token_logps(
    model: PreTrainedModel, groups: Sequence[PromptGroup], *, chunk_size: int | None = None
) -> list[list[Tensor]]:
    """Return the log-prob of every response token, with gradient: for training.

    The model's decoder runs once and its head is called once, whatever the groups are, so processes that share weights
    (ZeRO-3) stay in step; a model with positions that stretch with the batch is the exception, and cannot share. Call
    it inside the forward of the module that DDP or DeepSpeed wraps, with the plain model, which is how hooks on the
    wrapped module and on the model's parts see everything:

        class PairScorer(nn.Module):
            def forward(self, groups): return packed_token_logps(self.policy, groups)

    The model stays a child of that module and is saved on its own by `save_pretrained`.

    Args:
        model: a causal language model.
        groups: they make one packed row.
        chunk_size: positions whose logits exist at a time; by default as output_head.py finds best.

    Returns:
        For each group and response a float32 tensor of shape (response tokens,), in nats, in the order given.

    Raises:
        ModelError: the model makes its logits in a way that is not known here.
    """
    sizes = [len(response) for group in groups for response in group.responses]
    if not groups or not sum(sizes):
        return [[torch.zeros(0, device=model.device) for _ in group.responses] for group in groups]
    use_checked_attention(model)
    # Before the way is chosen: the check is a plain forward, and FlexAttention would be compiled for it.
    check_model(model)
    way = packed_way(model)
    if way == "separate":
        return _separate_token_logps(model, groups)
    parts = iter(_row_logps(model, filled(pack_row(groups), way), chunk_size).split(sizes))
    return [[next(parts) for _ in group.responses] for group in groups]


def group_logps(
    model: PreTrainedModel,
    groups: Sequence[PromptGroup],
    *,
    tokens_per_batch: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Return the summed log-prob of every response, without gradient: for scoring and evaluation.

    Args:
        model: a causal language model; it is used as it is (dropout should be off).
        groups: any number, of any lengths; batches are made here and the order is restored.
        tokens_per_batch: tokens a forward may hold; a prompt with one response that is longer runs alone.
        on_progress: called with (responses done, all responses) after each batch.

    Returns:
        For each group and response the float64 sum of its tokens' float32 log-probs, in nats, in the order given.

    Raises:
        ModelError: the model makes its logits in a way that is not known here.
    """
    sums = [[0.0] * len(group.responses) for group in groups]
    num_done, num_all = 0, sum(len(group.responses) for group in groups)
    with torch.no_grad():
        # One behind: while the accelerator runs a batch, the next is laid out.
        for places, logps in _one_behind(_batches(model, groups, tokens_per_batch)):
            values = logps.double().cpu().numpy()  # (response tokens,)
            ends = np.cumsum([len(groups[group].responses[index]) for group, index in places])  # (responses,)
            for (group, index), part in zip(places, np.split(values, ends[:-1]), strict=True):
                sums[group][index] = float(part.sum())
            num_done += len(places)
            if on_progress:
                on_progress(num_done, num_all)
    return sums


def _one_behind(batches: Iterator[Batch]) -> Iterator[Batch]:
    previous: Batch | None = None
    for batch in batches:
        if previous is not None:
            yield previous
        previous = batch
    if previous is not None:
        yield previous


def _batches(model: PreTrainedModel, groups: Sequence[PromptGroup], tokens_per_batch: int) -> Iterator[Batch]:
    use_checked_attention(model)
    check_model(model)
    way = packed_way(model)
    if way == "separate":
        yield from _separate_batches(model, groups, tokens_per_batch)
        return
    num_tokens = tokens_per_batch
    if model.device.type == "cpu" or way == "dense":
        # A long prompt must not be repeated for every response, for want of room beside it.
        longest = max((len(group.prompt_token_ids) for group in groups), default=0)
        num_tokens = min(tokens_per_batch, max(_SHORT_ROW_TOKENS, 2 * longest))
    for pieces in fill_rows(split_groups(groups, num_tokens), num_tokens):
        yield _places(pieces), _row_logps(model, filled(pack_row([piece.content for piece in pieces]), way))


def _places(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    return [(piece.group, index) for piece in pieces for index in piece.indices]


def _row_logps(model: PreTrainedModel, row: Row, chunk_size: int | None = None) -> Tensor:
    """Run a packed row. Result: (response tokens,), float32, in their order."""
    device = model.device
    hidden = model.get_decoder()(
        input_ids=_tensor(row.input_ids, device)[None],
        position_ids=_tensor(row.positions, device)[None],
        attention_mask=attention_masks(model, row, model.dtype),
        use_cache=False,
    ).last_hidden_state[0]  # (tokens, hidden size)
    # A spread model ends on another device than it begins on.
    hidden = hidden[_tensor(row.predictors, hidden.device)]  # (response tokens, hidden size)
    return target_logps(model, hidden, _tensor(row.targets, hidden.device), chunk_size)


def _tensor(values: object, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.asarray(values, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _padded_ids(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Return (sequences, longest) token ids, filled up with 0 on the right, where nothing that counts sees it."""
    ids = np.zeros((len(sequences), max(len(sequence) for sequence in sequences)), dtype=np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids


def _separate_batches(model: PreTrainedModel, groups: Sequence[PromptGroup], tokens_per_batch: int) -> Iterator[Batch]:
    places = [(number, index) for number, group in enumerate(groups) for index in range(len(group.responses))]
    lengths = [len(groups[number].prompt_token_ids) + len(groups[number].responses[index]) for number, index in places]
    for batch in length_batches(lengths, tokens_per_batch):
        chosen = [places[i] for i in batch]
        yield chosen, _separate_logps(model, [(groups[number], index) for number, index in chosen])


def _separate_token_logps(model: PreTrainedModel, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
    """Run each response in a row of its own. Result: a tensor of (response tokens,) for each group and response."""
    longest = max(len(group.prompt_token_ids) + len(response) for group in groups for response in group.responses)
    # Rows of nearly equal lengths, but all at once where another process waits for this one's only forward.
    is_shared = hasattr(next(model.parameters()), "ds_id")
    num_rows = sum(len(group.responses) for group in groups) if is_shared else 1
    found: dict[tuple[int, int], Tensor] = {}
    for places, logps in _separate_batches(model, groups, longest * num_rows):
        parts = logps.split([len(groups[number].responses[index]) for number, index in places])
        found |= zip(places, parts, strict=True)
    return [[found[number, index] for index in range(len(group.responses))] for number, group in enumerate(groups)]


def _separate_logps(model: PreTrainedModel, responses: Sequence[tuple[PromptGroup, int]]) -> Tensor:
    """Run each response in a row of its own, after its prompt. Result: (response tokens of all,), float32."""
    if stretches_positions(model) and len(responses) > 1:
        return torch.cat([_separate_logps(model, [response]) for response in responses])
    reset_positions(model)
    rows = [pack_row([PromptGroup(group.prompt_token_ids, [group.responses[index]])]) for group, index in responses]
    # With the last token, which a packed row has no use for: positions may depend on how long a text is.
    texts = [[*group.prompt_token_ids, *group.responses[index]] for group, index in responses]
    ids = _padded_ids(texts)  # (rows, tokens)
    hidden = model.get_decoder()(input_ids=_tensor(ids, model.device), use_cache=False).last_hidden_state
    # Both (response tokens,); predictors count in hidden.flatten(0, 1), (rows x tokens, hidden size).
    predictors = np.concatenate([row.predictors + number * ids.shape[1] for number, row in enumerate(rows)])
    targets = np.concatenate([row.targets for row in rows])
    chosen = hidden.flatten(0, 1)[_tensor(predictors, hidden.device)]  # (response tokens, hidden size)
    return target_logps(model, chosen, _tensor(targets, hidden.device))

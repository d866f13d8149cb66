"""The one place that turns a model and token ids into log-probs of responses: scoring, training and evaluation call it.

A prompt runs once for all its responses. Log-probs are taken at response positions only, from hidden states, in chunks
(output_head.py). How responses share a row is packing.py's business, and what a model sees of it attention.py's.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dice_core.attention import attention_masks, equally_long, packed_way, stretches_positions
from dice_core.output_head import check_head, target_logps
from dice_core.packing import Piece, PromptGroup, Row, fill_rows, length_batches, pack_row, split_groups

__all__ = ["PromptGroup", "group_logps", "packed_token_logps"]

# On a CPU larger batches are not faster, and short ones need less padding.
_CPU_BATCH_TOKENS = 1024

# Which responses a batch holds, as (group, index in the group), and the log-probs of their tokens one after another.
Batch = tuple[list[tuple[int, int]], Tensor]


def packed_token_logps(
    model: PreTrainedModel, groups: Sequence[PromptGroup], *, chunk_size: int | None = None
) -> list[list[Tensor]]:
    """Return the log-prob of every response token, with gradient: for training.

    The model's decoder runs once and its head is called once, whatever the groups are, so processes that share weights
    (ZeRO-3, FSDP) stay in step. Call it inside the forward of the module that DDP or DeepSpeed wraps, with the plain
    model, which is how hooks on the wrapped module and on the model's parts see everything:

        class PairScorer(nn.Module):
            def forward(self, groups): return packed_token_logps(self.policy, groups)

    The model stays a child of that module and is saved on its own by `save_pretrained`.

    Args:
        model: a causal language model.
        groups: they make one batch: one packed row with FlexAttention, a row for each group with a dense mask.
        chunk_size: positions whose logits exist at a time; by default as output_head.py finds best.

    Returns:
        For each group and response a float32 tensor of shape (response tokens,), in nats, in the order given.

    Raises:
        ModelError: the model makes its logits in a way that is not known here.
    """
    sizes = [len(response) for group in groups for response in group.responses]
    if not groups or not sum(sizes):
        return [[torch.zeros(0, device=model.device) for _ in group.responses] for group in groups]
    # Before the way is chosen: the check is a plain forward, and FlexAttention would be compiled for it.
    check_head(model)
    way = packed_way(model)
    if way == "separate":
        logps = _separate_logps(model, [(group, index) for group in groups for index in range(len(group.responses))])
    else:
        rows = [pack_row(groups)] if way == "flex" else [pack_row([group]) for group in groups]
        logps = _row_logps(model, equally_long(rows, way), chunk_size)
    parts = iter(logps.split(sizes))
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
            values = logps.double().cpu().numpy()
            ends = np.cumsum([len(groups[group].responses[index]) for group, index in places])
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
    check_head(model)
    way = packed_way(model)
    if way == "flex":
        for pieces in fill_rows(split_groups(groups, tokens_per_batch), tokens_per_batch):
            row = pack_row([piece.content for piece in pieces])
            yield _places(pieces), _row_logps(model, equally_long([row], way))
    elif way == "dense":
        # Without gradient, keeping the prompt's keys beats a mask that is empty for the most part.
        is_cpu = model.device.type == "cpu"
        batch_tokens = min(tokens_per_batch, _CPU_BATCH_TOKENS) if is_cpu else tokens_per_batch
        for number, group in enumerate(groups):
            yield from _cached_batches(model, number, group, batch_tokens)
    else:
        yield from _separate_batches(model, groups, tokens_per_batch)


def _places(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    return [(piece.group, index) for piece in pieces for index in piece.indices]


def _row_logps(model: PreTrainedModel, rows: Sequence[Row], chunk_size: int | None = None) -> Tensor:
    """Run packed rows of equal length. Result: (response tokens of all rows,), float32, in their order."""
    device, length = model.device, len(rows[0].input_ids)
    hidden = model.get_decoder()(
        input_ids=_tensor([row.input_ids for row in rows], device),
        position_ids=_tensor([row.positions for row in rows], device),
        attention_mask=attention_masks(model, rows, model.dtype),
        use_cache=False,
    ).last_hidden_state
    predictors = np.concatenate([row.predictors + number * length for number, row in enumerate(rows)])
    targets = np.concatenate([row.targets for row in rows])
    return target_logps(model, hidden.flatten(0, 1)[_tensor(predictors, device)], _tensor(targets, device), chunk_size)


def _tensor(values: object, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.asarray(values, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _cached_batches(model: PreTrainedModel, number: int, group: PromptGroup, batch_tokens: int) -> Iterator[Batch]:
    """Run the prompt once, keep its keys and values, and run the responses after them in batches of near lengths."""
    # Without the config: every layer keeps all keys, whatever its window, and masks count from the prompt's start.
    cache = DynamicCache()
    prompt = _tensor([group.prompt_token_ids], model.device)
    last = model.get_decoder()(input_ids=prompt, past_key_values=cache, use_cache=True).last_hidden_state[0, -1:]
    for indices in length_batches([len(response) for response in group.responses], batch_tokens):
        responses = [group.responses[index] for index in indices]
        outputs = _run_after(model, cache, [response[:-1] for response in responses])
        # The prompt's last token predicts the first of a response; an empty response has none.
        hidden = [
            torch.cat([last, output])[: len(response)] for output, response in zip(outputs, responses, strict=True)
        ]
        targets = np.concatenate([np.asarray(response, dtype=np.int64) for response in responses])
        logps = target_logps(model, torch.cat(hidden), _tensor(targets, model.device))
        yield [(number, index) for index in indices], logps


def _run_after(model: PreTrainedModel, cache: DynamicCache, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Run sequences that follow a cached prompt. Result: (tokens of the sequence, hidden size) for each."""
    num_rows, ids = len(sequences), _padded_ids(sequences)
    if not ids.shape[1]:
        width = model.get_output_embeddings().in_features
        return [torch.zeros(0, width, device=model.device, dtype=model.dtype)] * num_rows
    repeated = DynamicCache(
        (layer.keys.expand(num_rows, -1, -1, -1), layer.values.expand(num_rows, -1, -1, -1)) for layer in cache.layers
    )
    positions = torch.arange(ids.shape[1], device=model.device) + cache.get_seq_length()
    output = model.get_decoder()(
        input_ids=_tensor(ids, model.device),
        position_ids=positions.expand(num_rows, -1),
        past_key_values=repeated,
        use_cache=True,
    ).last_hidden_state
    return [row[: len(sequence)] for row, sequence in zip(output, sequences, strict=True)]


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


def _separate_logps(model: PreTrainedModel, responses: Sequence[tuple[PromptGroup, int]]) -> Tensor:
    """Run each response in a row of its own, after its prompt. Result: (response tokens of all,), float32."""
    if stretches_positions(model) and len(responses) > 1:
        return torch.cat([_separate_logps(model, [response]) for response in responses])
    rows = [pack_row([PromptGroup(group.prompt_token_ids, [group.responses[index]])]) for group, index in responses]
    ids = _padded_ids([row.input_ids.tolist() for row in rows])
    hidden = model.get_decoder()(input_ids=_tensor(ids, model.device), use_cache=False).last_hidden_state
    predictors = np.concatenate([row.predictors + number * ids.shape[1] for number, row in enumerate(rows)])
    targets = np.concatenate([row.targets for row in rows])
    return target_logps(model, hidden.flatten(0, 1)[_tensor(predictors, model.device)], _tensor(targets, model.device))

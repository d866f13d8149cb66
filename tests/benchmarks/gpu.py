"""On CUDA: scoring and training at the shape of an 8B model with random weights (no download), against upstream's way.

Speed is compared with what this card's matrix multiplication was measured to reach, and with what its maker states
(MFU). Operations counted are those of the weights, 2 a weight and token forward and 4 backward, on the tokens a way
must run if it shares prompts (the output head on response tokens alone); attention, recomputed activations and padding
count as nothing. So the peer's repeated prompts and dummy rows show as lost speed.

A CPU runs the same on a small model: that shows that it runs, and nothing of speed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dice_core.logprobs.packing import PromptGroup
from tests.benchmarks.measure import BenchmarkError, Timed
from tests.benchmarks.score import TOLERANCE_NATS, full_logits_logps

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# Weights and gradients in bfloat16 take 32 GB, which leaves room for activations on a card of 80 GB.
SHAPES: dict[str, dict[str, int]] = {
    "Llama 3 8B": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "Mistral 7B": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
    },
}
SMALL_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_TOKENS_PER_BATCH = 16_384
# bfloat16 matrix products without sparsity, operations per second, of NVIDIA's data sheets: by a part of a card's name.
_STATED_PEAKS = {
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
}


class Amounts(NamedTuple):
    """How much is run: groups to score, pairs to train on, and the share of the groups that the peer runs."""

    prompt_tokens: int = 512
    response_tokens: tuple[int, int] = (256, 768)
    num_prompts: int = 16
    num_responses: int = 16
    num_pairs: int = 8
    num_peer_prompts: int = 2
    """Enough for a rate, as it runs them one by one."""
    repeats: int = 3


def measure(folder: Path, shape_name: str) -> Timed:
    """Measure a shape of SHAPES on this GPU. `folder` is not read."""
    lines = measure_shape(shape_name, SHAPES[shape_name], "cuda", Amounts())
    return Timed(0.0, {"lines": lines}, round(max(line["peak memory, GB"] for line in lines) * 1e9))


def measure_shape(shape_name: str, shape: Mapping[str, int], device: str, amounts: Amounts) -> list[dict[str, Any]]:
    """Measure both stages, ours and upstream's, in turns on one model, once a small one has shown that they agree.

    Returns:
        A line for each way.
    """
    import torch

    from dice_core.training.throughput import matmul_peak

    rng = np.random.default_rng(0)
    small = random_model(SMALL_SHAPE, device, "float32")
    check(small, [_group(rng, n, SMALL_SHAPE["vocab_size"], amounts) for n in (2, 2)])
    # What was compiled for the small model does not count for the large one.
    torch._dynamo.reset()
    has_gpu = device == "cuda"
    model = random_model(shape, device, "bfloat16" if has_gpu else "float32")
    peaks = {"matmul peak": matmul_peak(), "stated peak": stated_peak()} if has_gpu else {}
    many = [_group(rng, amounts.num_responses, shape["vocab_size"], amounts) for _ in range(amounts.num_prompts)]
    pairs = [_group(rng, 2, shape["vocab_size"], amounts) for _ in range(amounts.num_pairs)]
    ways = {
        "score, ours": _Way(score_ours, many, 1),
        "score, upstream's forward": _Way(score_upstream, many[: amounts.num_peer_prompts], 1),
        "train, ours": _Way(train_ours, pairs, 3),
        "train, padded pairs, all logits, reference model": _Way(train_upstream, pairs, 3),
    }
    runs = {what: partial(way.run, model, way.groups) for what, way in ways.items()}
    timings = _in_turns(runs, amounts.repeats, has_gpu)
    lines = [
        {"shape": shape_name, "what": what, **_numbers(model, way, *timings[what], peaks)} for what, way in ways.items()
    ]
    for mine, theirs in zip(lines[::2], lines[1::2], strict=True):
        mine["ratio"] = mine["tokens/s"] / theirs["tokens/s"]
    return lines


def stated_peak() -> float | None:
    """Return what this card's maker states for bfloat16 products, operations per second; None: not known here."""
    import torch

    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _STATED_PEAKS.items() if part in name), None)


class _Way(NamedTuple):
    """A way, the groups it runs, and what it costs: 1 for a forward, 3 with the backward."""

    run: Callable[["PreTrainedModel", Sequence[PromptGroup]], list[float]]
    groups: Sequence[PromptGroup]
    num_passes: int


def _numbers(
    model: "PreTrainedModel", way: _Way, seconds: list[float], memory: int, peaks: Mapping[str, float | None]
) -> dict[str, Any]:
    from dice_core.training.throughput import num_operations

    num_tokens = sum(map(_num_tokens, way.groups))
    num_response_tokens = sum(len(response) for group in way.groups for response in group.responses)
    rate = way.num_passes * num_operations(model, num_tokens, num_response_tokens) / float(np.median(seconds))
    return {
        "tokens/s": num_tokens / float(np.median(seconds)),
        "slowest": num_tokens / max(seconds),
        "fastest": num_tokens / min(seconds),
        "ratio": None,
        **{f"share of {name}": rate / peak if peak else None for name, peak in peaks.items()},
        **{f"{name}, TFLOP/s": peak / 1e12 if peak else None for name, peak in peaks.items()},
        "peak memory, GB": memory / 1e9,
    }


def random_model(shape: Mapping[str, int], device: str = "cuda", dtype: str = "bfloat16") -> "PreTrainedModel":
    """Make a Llama with random weights where it is used."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).eval()
    finally:
        torch.set_default_dtype(before)


def _group(rng: np.random.Generator, num_responses: int, vocabulary: int, amounts: Amounts) -> PromptGroup:
    def ids(length: int) -> list[int]:
        return rng.integers(0, vocabulary, length).tolist()

    lengths = rng.integers(*amounts.response_tokens, num_responses)
    return PromptGroup(ids(amounts.prompt_tokens), [ids(int(length)) for length in lengths])


def _num_tokens(group: PromptGroup) -> int:
    return len(group.prompt_token_ids) + sum(len(response) for response in group.responses)


def score_ours(model: "PreTrainedModel", groups: Sequence[PromptGroup]) -> list[float]:
    """Score prompt groups packed. One model: policy and reference cost the same."""
    from dice_core.logprobs.forward import group_logps

    return list(chain.from_iterable(group_logps(model, groups, tokens_per_batch=_TOKENS_PER_BATCH)))


def score_upstream(model: "PreTrainedModel", groups: Sequence[PromptGroup]) -> list[float]:
    """Score one response at a time beside a dummy row."""
    import torch

    _take_sdpa(model)
    with torch.no_grad():
        return [
            float(full_logits_logps(model, [(prompt, list(ids)), (prompt, [1, 2])], pad_id=0)[0])
            for prompt, ids in _rows(groups)
        ]


def train_ours(model: "PreTrainedModel", pairs: Sequence[PromptGroup]) -> list[float]:
    """Run pairs forward and backward, packed, with activation checkpointing; the references are known."""
    import torch

    from dice_core.logprobs.forward import packed_token_logps

    def logps(pair: PromptGroup) -> "torch.Tensor":
        (tokens,) = packed_token_logps(model, [pair])
        return torch.stack([response.sum() for response in tokens])

    return _train(model, pairs, logps)


def train_upstream(model: "PreTrainedModel", pairs: Sequence[PromptGroup]) -> list[float]:
    """Run each pair as two padded rows with all logits, after the same forward of a reference model."""
    import torch

    _take_sdpa(model)

    def logps(pair: PromptGroup) -> "torch.Tensor":
        with torch.no_grad():
            full_logits_logps(model, _rows([pair]), pad_id=0)
        return full_logits_logps(model, _rows([pair]), pad_id=0)

    return _train(model, pairs, logps)


def _take_sdpa(model: "PreTrainedModel") -> None:
    """Give the peer its own attention back: scoring packed rows switches a model on CUDA to FlexAttention."""
    model.set_attn_implementation("sdpa")


def _train(
    model: "PreTrainedModel", pairs: Sequence[PromptGroup], logps: "Callable[[PromptGroup], torch.Tensor]"
) -> list[float]:
    import torch

    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = []
    for pair in pairs:
        chosen, rejected = logps(pair)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected).double()).float()
        loss.backward()
        losses.append(float(loss.detach()))
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_disable()
    model.eval()
    return losses


def _rows(groups: Sequence[PromptGroup]) -> list[tuple[list[int], list[int]]]:
    return [(list(group.prompt_token_ids), list(response)) for group in groups for response in group.responses]


def _in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int, has_gpu: bool) -> dict[str, tuple[list[float], int]]:
    """Return the seconds of each run's repeats, after a first that compiles, and its peak memory (0 on a CPU)."""
    import torch

    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {what: [] for what in runs}
    memory = dict.fromkeys(runs, 0)
    for _ in range(repeats):
        for what, run in runs.items():
            if has_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run()
            if has_gpu:
                torch.cuda.synchronize()
                memory[what] = max(memory[what], torch.cuda.max_memory_allocated())
            seconds[what].append(time.perf_counter() - start)
    return {what: (seconds[what], memory[what]) for what in runs}


def _gradient_sizes(
    model: "PreTrainedModel",
    pairs: Sequence[PromptGroup],
    train: Callable[["PreTrainedModel", Sequence[PromptGroup]], list[float]],
) -> list[float]:
    """Return the norm of each weight's gradient after the last pair."""
    sizes: dict[str, float] = {}
    handles = [
        weight.register_post_accumulate_grad_hook(
            lambda weight, name=name: sizes.__setitem__(name, float(weight.grad.norm()))
        )
        for name, weight in model.named_parameters()
    ]
    train(model, pairs)
    for handle in handles:
        handle.remove()
    return [sizes[name] for name in sorted(sizes)]


def check(model: "PreTrainedModel", groups: Sequence[PromptGroup]) -> None:
    """Compare both ways on a float32 model.

    Raises:
        BenchmarkError: a log-prob, a loss or a gradient's norm differs by more than the tolerance.
    """
    for mine, theirs in (
        (score_ours(model, groups), score_upstream(model, groups)),
        (train_ours(model, groups), train_upstream(model, groups)),
        (_gradient_sizes(model, groups, train_ours), _gradient_sizes(model, groups, train_upstream)),
    ):
        farthest = float(np.abs(np.subtract(mine, theirs)).max())
        if farthest > TOLERANCE_NATS:
            raise BenchmarkError(f"ours and upstream's way differ by {farthest:.2g}")

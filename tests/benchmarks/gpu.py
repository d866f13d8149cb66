"""On CUDA: scoring and training at the shape of an 8B model with random weights (no download), against upstream's way.

Speed is compared with what this card's matrix multiplication was measured to reach. Operations counted are those of the
weights, 2 a weight and token forward and 4 backward, on the tokens a way must run if it shares prompts (the output head
on response tokens alone); attention, recomputed activations and padding count as nothing. So the peer's repeated
prompts and dummy rows show as lost speed.
"""

from collections.abc import Callable, Sequence
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
_PROMPT_TOKENS, _RESPONSE_TOKENS = 512, (256, 768)
_NUM_PROMPTS, _NUM_RESPONSES, _NUM_PAIRS = 16, 16, 8
# Enough for a rate, as it runs them one by one.
_NUM_PEER_PROMPTS = 2
_TOKENS_PER_BATCH = 16_384
_REPEATS = 3


def measure(folder: Path, shape_name: str) -> Timed:
    """Measure both stages, ours and upstream's, in turns on one model, once a small one has shown that they agree.

    `folder` is not read.
    """
    import torch

    from dice_core.training.throughput import matmul_peak

    # A mask compiled anew too often would run without its compiled kernel, and only be slow.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    rng = np.random.default_rng(0)
    check(random_model(SMALL_SHAPE, dtype="float32"), [_group(rng, n, SMALL_SHAPE["vocab_size"]) for n in (2, 2)])
    shape = SHAPES[shape_name]
    model, peak = random_model(shape), matmul_peak()
    many = [_group(rng, _NUM_RESPONSES, shape["vocab_size"]) for _ in range(_NUM_PROMPTS)]
    pairs = [_group(rng, 2, shape["vocab_size"]) for _ in range(_NUM_PAIRS)]
    ways = {
        "score, ours": _Way(score_ours, many, 1),
        "score, upstream's forward": _Way(score_upstream, many[:_NUM_PEER_PROMPTS], 1),
        "train, ours": _Way(train_ours, pairs, 3),
        "train, padded pairs, all logits, reference model": _Way(train_upstream, pairs, 3),
    }
    timings = _in_turns({what: partial(way.run, model, way.groups) for what, way in ways.items()})
    lines = [
        {"shape": shape_name, "what": what, **_numbers(model, way, *timings[what], peak)} for what, way in ways.items()
    ]
    for mine, theirs in zip(lines[::2], lines[1::2], strict=True):
        mine["ratio"] = mine["tokens/s"] / theirs["tokens/s"]
    return Timed(0.0, {"lines": lines}, max(memory for _, memory in timings.values()))


class _Way(NamedTuple):
    """A way, the groups it runs, and what it costs: 1 for a forward, 3 with the backward."""

    run: Callable[["PreTrainedModel", Sequence[PromptGroup]], list[float]]
    groups: Sequence[PromptGroup]
    num_passes: int


def _numbers(model: "PreTrainedModel", way: _Way, seconds: list[float], memory: int, peak: float) -> dict[str, Any]:
    from dice_core.training.throughput import num_operations

    num_tokens = sum(map(_num_tokens, way.groups))
    num_response_tokens = sum(len(response) for group in way.groups for response in group.responses)
    rate = way.num_passes * num_operations(model, num_tokens, num_response_tokens) / float(np.median(seconds))
    return {
        "tokens/s": num_tokens / float(np.median(seconds)),
        "slowest": num_tokens / max(seconds),
        "fastest": num_tokens / min(seconds),
        "ratio": None,
        "share of matmul peak": rate / peak,
        "matmul peak, TFLOP/s": peak / 1e12,
        "peak memory, GB": memory / 1e9,
    }


def random_model(shape: dict[str, int], device: str = "cuda", dtype: str = "bfloat16") -> "PreTrainedModel":
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


def _group(rng: np.random.Generator, num_responses: int, vocabulary: int) -> PromptGroup:

    def ids(length: int) -> list[int]:
        return rng.integers(0, vocabulary, length).tolist()

    return PromptGroup(ids(_PROMPT_TOKENS), [ids(int(rng.integers(*_RESPONSE_TOKENS))) for _ in range(num_responses)])


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


def _in_turns(runs: dict[str, Callable[[], Any]]) -> dict[str, tuple[list[float], int]]:
    """Return the seconds of each run's repeats, after a first that compiles, and its peak memory."""
    import torch

    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {what: [] for what in runs}
    memory = dict.fromkeys(runs, 0)
    for _ in range(_REPEATS):
        for what, run in runs.items():
            torch.cuda.reset_peak_memory_stats()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            seconds[what].append(start.elapsed_time(end) / 1000)
            memory[what] = max(memory[what], torch.cuda.max_memory_allocated())
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

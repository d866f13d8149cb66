"""On CUDA: scoring and training at the shape of an 8B model with random weights (no download), against upstream's way.

Speed is compared with what this card's matrix multiplication was measured to reach. Operations counted are those of the
weights, 2 a weight and token forward and 4 backward, on the tokens a way must run if it shares prompts (the output head
on response tokens alone); attention, recomputed activations and padding count as nothing. So the peer's repeated
prompts and dummy rows show as lost speed.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dice_core.packing import PromptGroup
from tests.benchmarks.measure import BenchmarkError, Timed
from tests.benchmarks.score import TOLERANCE_NATS, full_logits_logps

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# Llama 3 8B; weights and gradients in bfloat16 are 32 GB and leave room for activations on a card of 80 GB.
_SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_PROMPT_TOKENS, _RESPONSE_TOKENS = 512, (256, 768)
_NUM_PROMPTS, _NUM_RESPONSES, _NUM_PAIRS = 16, 16, 8
# Enough for a rate, as it runs them one by one.
_NUM_PEER_PROMPTS = 2
_TOKENS_PER_BATCH = 16_384
_REPEATS = 3


def measure(folder: Path) -> Timed:
    """Measure both stages, ours and upstream's, in turns on one model. `folder` is not read."""
    import torch

    from dice_core.throughput import matmul_peak

    model = random_model(_SHAPE)
    peak = matmul_peak()
    rng = np.random.default_rng(0)
    many = [_group(rng, _NUM_RESPONSES) for _ in range(_NUM_PROMPTS)]
    few = many[:_NUM_PEER_PROMPTS]
    pairs = [_group(rng, 2) for _ in range(_NUM_PAIRS)]
    lines = []
    for what, run, groups, operations in (
        ("score, ours", score_ours, many, 2),
        ("score, upstream's forward", score_upstream, few, 2),
        ("train, ours", train_ours, pairs, 6),
        ("train, padded pairs, all logits, reference model", train_upstream, pairs, 6),
    ):
        seconds, memory = _timed(lambda run=run, groups=groups: run(model, groups))
        num_tokens, work = sum(map(_num_tokens, groups)), operations * _num_products(model, groups)
        lines.append(
            {
                "what": what,
                "tokens/s, median (min..max)": _spread([num_tokens / each for each in seconds]),
                "share of matmul peak": f"{work / float(np.median(seconds)) / peak:.1%}",
                "peak memory, GB": f"{memory / 1e9:.1f}",
            }
        )
    lines.append({**dict.fromkeys(lines[0], "-"), "what": f"matmul peak, bfloat16: {peak / 1e12:.0f} TFLOP/s"})
    return Timed(0.0, {"lines": lines}, torch.cuda.max_memory_allocated())


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


def _group(rng: np.random.Generator, num_responses: int) -> PromptGroup:

    def ids(length: int) -> list[int]:
        return rng.integers(0, _SHAPE["vocab_size"], length).tolist()

    return PromptGroup(ids(_PROMPT_TOKENS), [ids(int(rng.integers(*_RESPONSE_TOKENS))) for _ in range(num_responses)])


def _num_tokens(group: PromptGroup) -> int:
    return len(group.prompt_token_ids) + sum(len(response) for response in group.responses)


def _num_products(model: "PreTrainedModel", groups: Sequence[PromptGroup]) -> int:
    """Return weights times tokens: every token meets the layers, a response's the output head as well."""
    head = model.get_output_embeddings().weight.numel()
    layers = sum(weight.numel() for weight in model.get_decoder().layers.parameters())
    num_responses = sum(len(response) for group in groups for response in group.responses)
    return layers * sum(map(_num_tokens, groups)) + head * num_responses


def score_ours(model: "PreTrainedModel", groups: Sequence[PromptGroup]) -> list[float]:
    """Score prompt groups packed. One model: policy and reference cost the same."""
    from dice_core.logprobs import group_logps

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

    from dice_core.logprobs import packed_token_logps

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


def _timed(run: Callable[[], Any]) -> tuple[list[float], int]:
    """Return the seconds of each repeat after a first that does not count (it compiles), and the peak memory."""
    import torch

    run()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return seconds, torch.cuda.max_memory_allocated()


def _spread(values: Sequence[float]) -> str:
    return f"{np.median(values):,.0f} ({min(values):,.0f}..{max(values):,.0f})"


def check(model: "PreTrainedModel", groups: Sequence[PromptGroup]) -> None:
    """Compare both ways on a float32 model.

    Raises:
        BenchmarkError: a log-prob or a loss differs by more than the tolerance.
    """
    for mine, theirs in (
        (score_ours(model, groups), score_upstream(model, groups)),
        (train_ours(model, groups), train_upstream(model, groups)),
    ):
        farthest = float(np.abs(np.subtract(mine, theirs)).max())
        if farthest > TOLERANCE_NATS:
            raise BenchmarkError(f"ours and upstream's way differ by {farthest:.2g}")

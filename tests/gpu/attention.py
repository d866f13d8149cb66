"""FlexAttention, forward and backward, against the models' own formula of attention in float32, row by row.

Packed rows of several blocks: prompts that responses share, a sliding window in all layers and in some, a soft cap,
grouped heads. In bfloat16 no more may be lost than that formula itself loses there.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from dice_core.logprobs.forward import PromptGroup, packed_token_logps
from dice_core.models.rotary import reset_positions
from tests.gpu.scale import Scale

LOGPS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-3
"""In float32: nats of a token, and the share of a gradient's norm."""
_VOCABULARY = 503
_SHAPE: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_WINDOW = {"sliding_window": 100}
_IN_ONE_LAYER = {"layer_types": ["sliding_attention", "full_attention"], **_WINDOW}
CONFIGS = {
    "llama": transformers.LlamaConfig(**_SHAPE),
    "mistral, window": transformers.MistralConfig(**_SHAPE, **_WINDOW),
    # Products beyond the cap, so that it shows.
    "gemma2, soft cap": transformers.Gemma2Config(
        **_SHAPE, **_WINDOW, attn_logit_softcapping=0.5, query_pre_attn_scalar=1, final_logit_softcapping=10.0
    ),
    "gemma3, window in one layer": transformers.Gemma3TextConfig(**_SHAPE, **_IN_ONE_LAYER),
}
# Tokens of a prompt and its responses: beyond blocks of 128 and the window, and far below them.
_LENGTHS = [(150, [200, 40, 129]), (5, [3, 260]), (128, [1, 128])]


def measure(scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield the largest differences by model, as each is compared.

    Raises:
        AssertionError: one is beyond its tolerance.
    """
    numbers: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        model = random_model(config).to(scale.device)
        groups = random_groups()
        expected = plain_logps(model, groups)
        expected_gradients = gradients(model, expected)
        found = packed_logps(model, groups)
        numbers[f"{name}: attention"] = model.config._attn_implementation
        numbers[f"{name}: float32, nats"] = farthest(found, expected)
        share = farthest_share(gradients(model, found), expected_gradients)
        numbers[f"{name}: float32, share of a gradient"] = share
        assert numbers[f"{name}: float32, nats"] < LOGPS_TOLERANCE, numbers
        assert share < GRADIENT_TOLERANCE, numbers
        rounded = random_model(config).to(scale.device, torch.bfloat16)
        for way, logps in (("its own formula", plain_logps(rounded, groups)), ("ours", packed_logps(rounded, groups))):
            numbers[f"{name}: bfloat16, {way}, nats"] = farthest(logps, expected)
            numbers[f"{name}: bfloat16, {way}, share of a gradient"] = farthest_share(
                gradients(rounded, logps), expected_gradients
            )
        for what in ("nats", "share of a gradient"):
            lost, lost_by_plain = (numbers[f"{name}: bfloat16, {way}, {what}"] for way in ("ours", "its own formula"))
            assert lost < 2 * lost_by_plain + 0.01, numbers
        if scale.device == "cuda":
            assert numbers[f"{name}: attention"] == "flex_attention", numbers
        yield numbers


def random_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Return a model whose weights are so large that attention to a wrong token shows."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return model


def random_groups() -> list[PromptGroup]:
    """Return groups of random tokens."""
    rng = np.random.default_rng(5)

    def tokens(count: int) -> list[int]:
        return rng.integers(3, _VOCABULARY, count).tolist()

    return [PromptGroup(tokens(prompt), [tokens(length) for length in lengths]) for prompt, lengths in _LENGTHS]


def packed_logps(model: transformers.PreTrainedModel, groups: Sequence[PromptGroup]) -> Tensor:
    """Return the log-probs of all response tokens, one after another, by the way of scoring and training."""
    return torch.cat([logps for group in packed_token_logps(model, groups) for logps in group])


def plain_logps(model: transformers.PreTrainedModel, groups: Sequence[PromptGroup]) -> Tensor:
    """Return the same from one row at a time, all logits, no mask of ours, the model's own formula of attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    found = []
    for group in groups:
        for response in group.responses:
            reset_positions(model)
            ids = torch.tensor([[*group.prompt_token_ids, *response]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)  # (tokens, vocabulary)
            start = len(group.prompt_token_ids)
            found.append(logits[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    model.set_attn_implementation(before)
    return torch.cat(found)


def farthest(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference."""
    return float((found.detach() - expected.detach()).abs().max())


def farthest_share(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of a gradient as a share of its norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((mine.float() - plain).norm() / plain.norm()) for mine, plain in pairs)


def gradients(model: transformers.PreTrainedModel, logps: Tensor) -> list[Tensor]:
    """Return the gradients of something that treats every token differently."""
    weights = torch.linspace(0.5, 1.5, len(logps), device=logps.device)
    return list(torch.autograd.grad((logps.sin() * weights).sum(), list(model.parameters())))

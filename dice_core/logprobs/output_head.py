"""Hidden states to log-probs of given tokens, a chunk of positions at a time: the logits never exist whole.

Log-softmax is float32 always. With gradient, a chunk's logits are computed again in backward instead of kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Logits of a chunk. On a CPU they should be near its caches; on an accelerator each chunk also costs a pass over the
# gradient of the head's weights. Measured on a CPU with 49,152 words: 64 to 256 positions are fastest.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class LogitScale:
    """What a model does to the product of hidden state and head: y = softcap * tanh(factor * x / softcap)."""

    factor: float = 1.0
    softcap: float = math.inf

    def apply(self, logits: Tensor) -> Tensor:
        """Scale logits in place. Any shape."""
        if self.factor != 1:
            logits.mul_(self.factor)
        if math.isfinite(self.softcap):
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def apply_backward(self, gradient: Tensor, scaled: Tensor) -> Tensor:
        """Turn the gradient of scaled logits, in place, into that of the unscaled ones. Any shape."""
        if math.isfinite(self.softcap):
            gradient.mul_(1 - (scaled / self.softcap).square_())
        return gradient.mul_(self.factor) if self.factor != 1 else gradient


def logit_scale(model: PreTrainedModel) -> LogitScale:
    """Return the scale a model's config asks for: soft caps as Gemma's, factors as Cohere's and Granite's."""
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    softcaps = (getattr(config, name, None) for name in _SOFTCAPS)
    return LogitScale(factor / divisor, next(filter(None, softcaps), math.inf))


def target_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor, chunk_size: int | None = None) -> Tensor:
    """Return the log-probs of target tokens in nats, float32.

    The head module itself is called, once, with its forward exchanged: hooks on it (DeepSpeed ZeRO-3 collects its
    weights there, before the forward and before the backward) see one call, however many chunks a process has.

    Args:
        model: whose output head is meant; `trial.check_model` has seen it.
        hidden: (tokens, hidden size), what the head would get.
        targets: (tokens,), token ids.
        chunk_size: positions at a time; by default a chunk's logits take 32 MiB on a CPU, 512 MiB on an accelerator.

    Returns:
        (tokens,).
    """
    head = model.get_output_embeddings()
    kind = "cpu" if hidden.device.type == "cpu" else "cuda"
    chunk_size = chunk_size or max(1, CHUNK_LOGITS[kind] // model.config.get_text_config().vocab_size)
    settings = _Settings(chunk_size, logit_scale(model), _product_dtype(hidden.device.type, head.weight.dtype))

    def forward(hidden: Tensor) -> Tensor:
        logps: Tensor = _ChunkedLogps.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets.to(hidden.device), settings
        )
        return logps

    before = vars(head).get("forward")
    head.forward = forward
    try:
        logps: Tensor = head(hidden)
        return logps
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def _product_dtype(device_type: str, weight_dtype: torch.dtype) -> torch.dtype:
    is_autocast = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_autocast else weight_dtype


@dataclass(frozen=True)
class _Settings:
    chunk_size: int
    scale: LogitScale
    dtype: torch.dtype


class _ChunkedLogps(torch.autograd.Function):
    """log_softmax(scale(hidden @ weight.T + bias))[targets], chunk by chunk. Result: (tokens,), float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        product_weight = weight.to(settings.dtype)  # (vocabulary, hidden size)
        logps = hidden.new_empty(len(targets), dtype=torch.float32)  # (tokens,)
        # Buffers for all chunks: fresh memory for each costs a CPU as much as the log-softmax itself.
        logits, softened = _buffer(hidden, weight, settings), _buffer(hidden, weight, settings)
        for rows in _chunks(len(targets), settings.chunk_size):
            scaled = _write_logits(logits, hidden[rows], product_weight, bias, settings)  # (chunk, vocabulary)
            torch.log_softmax(scaled, 1, out=softened[: len(scaled)])
            logps[rows] = softened[: len(scaled)].gather(1, targets[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings = settings
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        settings: _Settings = ctx.settings
        product_weight = weight.to(settings.dtype)  # (vocabulary, hidden size)
        grad_hidden = torch.empty_like(hidden)  # (tokens, hidden size)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        logits, softened = _buffer(hidden, weight, settings), _buffer(hidden, weight, settings)
        for rows in _chunks(len(targets), settings.chunk_size):
            scaled = _write_logits(logits, hidden[rows], product_weight, bias, settings)  # (chunk, vocabulary)
            # d logp / d logits = [is target] - softmax(logits)
            delta = torch.softmax(scaled, 1, out=softened[: len(scaled)]).neg_()  # (chunk, vocabulary)
            delta.scatter_add_(1, targets[rows, None], torch.ones_like(delta[:, :1]))
            delta = settings.scale.apply_backward(delta.mul_(grad[rows, None]), scaled)
            if grad_bias is not None:
                grad_bias += delta.sum(0)
            delta = delta.to(settings.dtype)
            grad_hidden[rows] = delta @ product_weight
            if grad_weight is not None:
                _add_product(grad_weight, delta.T, hidden[rows].to(settings.dtype))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _buffer(hidden: Tensor, weight: Tensor, settings: _Settings) -> Tensor:
    """Return memory for the logits of the largest chunk. Shape: (chunk, vocabulary), float32."""
    return hidden.new_empty(min(settings.chunk_size, len(hidden)), len(weight), dtype=torch.float32)


def _chunks(num_tokens: int, chunk_size: int) -> Iterator[slice]:
    return (slice(start, start + chunk_size) for start in range(0, num_tokens, chunk_size))


def _write_logits(
    buffer: Tensor, hidden: Tensor, product_weight: Tensor, bias: Tensor | None, settings: _Settings
) -> Tensor:
    """Return a chunk's scaled logits in the buffer's memory, float32. Shape: (chunk, vocabulary)."""
    hidden, logits = hidden.to(settings.dtype), buffer[: len(hidden)]
    if settings.dtype == torch.float32:
        torch.mm(hidden, product_weight.T, out=logits)
    elif hidden.is_cuda:
        # The product is kept as it is summed, in float32: rounding logits to bfloat16 is noise for nothing.
        torch.mm(hidden, product_weight.T, out_dtype=torch.float32, out=logits)
    else:
        logits.copy_(hidden @ product_weight.T)
    if bias is not None:
        logits += bias
    return settings.scale.apply(logits)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a float32 matrix."""
    if right.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += left @ right

"""The shape of a model: how many weights, in which parts, by what its config.json says.

Dense decoders of the Llama kind are counted by their formula; any other is built on transformers' meta device, which
takes the seconds that torch needs to load. known_models.py and find_model.py say where a config comes from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dice_core.settings.base import ConfigError

_COUNTED = ("llama", "mistral", "qwen2", "qwen3")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL = ("num_key_value_heads", "head_dim")
MODEL_CONFIG = "give MODEL_CONFIG=path/to/config.json"
"""What helps where the shape of a model is not known."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder. Counts are of weights."""

    num_parameters: int
    """All, tied ones once."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    ties_embeddings: bool
    """The output head is the input embedding."""

    @property
    def num_embedding(self) -> int:
        """The weights of the input embedding, and as many of the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_layer_weights(self) -> int:
        """What every token is multiplied with: all layers."""
        return self.num_parameters - self.num_embedding * (1 if self.ties_embeddings else 2)

    def forward_operations(self, num_tokens: float, num_response_tokens: float) -> float:
        """Return the operations of a forward's matrix products, attention apart: 2 a weight and token.

        Every token meets the layers, a response's the output head as well: as training's throughput.py counts.
        """
        return 2 * (self.num_layer_weights * num_tokens + self.num_embedding * num_response_tokens)

    def kv_bytes_per_token(self, bytes_per_value: int, num_gpus: int = 1) -> float:
        """Return the bytes of a token's keys and values on one of the GPUs that share a model: heads are not cut."""
        heads = max(1.0, self.num_kv_heads / num_gpus)
        return 2 * self.num_layers * heads * self.head_size * bytes_per_value


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """Return the shape of a model by its config.json.

    Args:
        config: parsed.
        where: what messages call it.

    Raises:
        ConfigError: no config of a dense decoder.
    """
    # A model that also sees pictures has its text part apart.
    text = config.get("text_config") or config
    lacking = [name for name in (*_NEEDED, "model_type") if not isinstance(text.get(name), int | str)]
    if lacking:
        raise ConfigError(f"{where}: names no {lacking[0]}: the plan knows decoders of text, {MODEL_CONFIG} of one")
    odd = [name for name in (*_NEEDED, *_OPTIONAL) if not _is_size(text.get(name), can_lack=name in _OPTIONAL)]
    if odd:
        raise ConfigError(f"{where}: {odd[0]} must be a whole number of 1 or more, got {text[odd[0]]!r}")
    if text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts"):
        raise ConfigError(f"{where}: is a mixture of experts, whose memory and speed the plan does not know")
    heads = text["num_attention_heads"]
    sizes = {
        "num_layers": text["num_hidden_layers"],
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": text.get("num_key_value_heads") or heads,
        "head_size": text.get("head_dim") or text["hidden_size"] // heads,
        "vocab_size": text["vocab_size"],
        "ties_embeddings": bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
    }
    is_counted = text["model_type"] in _COUNTED and not (text.get("attention_bias") or text.get("mlp_bias"))
    count = _formula(text["model_type"], sizes) if is_counted else meta_count(config, where)
    return ModelShape(num_parameters=count, **sizes)


def _is_size(value: object, *, can_lack: bool) -> bool:
    return (can_lack and value is None) or (type(value) is int and value >= 1)


def _formula(model_type: str, sizes: Mapping[str, Any]) -> int:
    """Return the weights of a Llama-like decoder: attention, gated MLP, two norms a layer; embedding, norm, head."""
    hidden, head = sizes["hidden_size"], sizes["head_size"]
    queries, keys = sizes["num_heads"] * head, sizes["num_kv_heads"] * head
    attention = 2 * hidden * queries + 2 * hidden * keys
    if model_type == "qwen2":
        attention += queries + 2 * keys  # biases of q, k and v
    if model_type == "qwen3":
        attention += 2 * head  # norms of q and k
    layer = attention + 3 * hidden * sizes["intermediate_size"] + 2 * hidden
    embeddings = sizes["vocab_size"] * hidden * (1 if sizes["ties_embeddings"] else 2)
    total: int = sizes["num_layers"] * layer + hidden + embeddings
    return total


def meta_count(config: Mapping[str, Any], where: str) -> int:
    """Return the weights of the model that transformers builds of a config, on the meta device: it takes no memory.

    Raises:
        ConfigError: transformers has no such model, or cannot build it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        kind, values = config["model_type"], {name: value for name, value in config.items() if name != "model_type"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    # Values of a stranger's file: whatever fails behind transformers' own validation.
    except Exception as error:
        raise ConfigError(
            f"{where}: transformers builds no model of it: {' '.join(str(error).split())[:200]}"
        ) from None
    return sum(weight.numel() for weight in model.parameters())

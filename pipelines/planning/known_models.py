"""The models that presets name, as their config.json on the Hub has them: the plan needs no Hub for these.

`source` is where the numbers were read; the counts that follow are those of the model cards (a test holds both).
"""

from typing import Any, NamedTuple

from pipelines.planning.ranges import Range

CHARACTERS_PER_TOKEN = 4.3
"""Of English under vocabularies of 32,000 words and more. Measured: 4.29 on the demo's pairs with SmolLM2's."""


class KnownModel(NamedTuple):
    """A model's config, and how long its answers are."""

    config: dict[str, Any]
    source: str
    response_tokens: Range
    """Mean length of its answers, if no limit cut them."""
    response_source: str


def _decoder(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, words: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        **more,
    }


_MISTRAL_7B = _decoder("mistral", 4096, 14_336, 32, 32, 8, 32_000)
_LLAMA3_8B = _decoder("llama", 4096, 14_336, 32, 32, 8, 128_256)
_LLAMA3_70B = _decoder("llama", 8192, 28_672, 80, 64, 8, 128_256)
_QWEN25_32B = _decoder("qwen2", 5120, 27_648, 64, 40, 8, 152_064)
_QWEN3_8B = _decoder("qwen3", 4096, 12_288, 36, 32, 8, 151_936, head_dim=128)
_SMOLLM2_135M = _decoder("llama", 576, 1536, 30, 9, 3, 49_152, tie_word_embeddings=True)

_OF_CHAT_MODELS = "AlpacaEval 2 leaderboard, avg_length: {} characters, at 4.3 a token, and a fifth to either side"


def _measured(characters: int) -> tuple[Range, str]:
    tokens = characters / CHARACTERS_PER_TOKEN
    return Range(round(0.8 * tokens), round(1.2 * tokens)), _OF_CHAT_MODELS.format(f"{characters:,}")


# zephyr-7b-beta, Meta-Llama-3-8B-Instruct, Meta-Llama-3-70B-Instruct, Qwen2-72B-Instruct stand for their kinds.
_ZEPHYR, _LLAMA3_SMALL, _LLAMA3_LARGE, _QWEN = (_measured(n) for n in (1444, 1899, 1919, 1626))
# 256 responses of the benchmark's generation (make bench BENCH="--stage generate", 16 prompts of the demo).
_SMOLLM2 = (Range(75, 95), "measured by the benchmark of generation on prompts like the demo's")

KNOWN_MODELS: dict[str, KnownModel] = {
    **{
        name: KnownModel(_MISTRAL_7B, "config.json of mistralai/Mistral-7B-v0.1", *_ZEPHYR)
        for name in ("HuggingFaceH4/zephyr-7b-beta", "HuggingFaceH4/mistral-7b-sft-beta", "mistralai/Mistral-7B-v0.1")
    },
    **{
        name: KnownModel(_LLAMA3_8B, "config.json of meta-llama/Meta-Llama-3-8B", *_LLAMA3_SMALL)
        for name in (
            "princeton-nlp/Llama-3-Base-8B-SFT-DPO",
            "princeton-nlp/Llama-3-Base-8B-SFT",
            "meta-llama/Meta-Llama-3-8B",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "meta-llama/Llama-3.1-8B-Instruct",
            "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
        )
    },
    "Skywork/Skywork-Reward-V2-Qwen3-8B": KnownModel(_QWEN3_8B, "config.json of Qwen/Qwen3-8B", *_QWEN),
    **{
        name: KnownModel(_LLAMA3_70B, "config.json of meta-llama/Meta-Llama-3-70B", *_LLAMA3_LARGE)
        for name in ("meta-llama/Meta-Llama-3-70B-Instruct", "meta-llama/Llama-3.3-70B-Instruct")
    },
    # Tulu adds a few ids to the vocabulary of its base.
    **{
        name: KnownModel(_LLAMA3_70B, "config.json of its base, meta-llama/Llama-3.1-70B", *_LLAMA3_LARGE)
        for name in ("allenai/Llama-3.1-Tulu-3-70B-DPO", "allenai/Llama-3.1-Tulu-3-70B-SFT")
    },
    **{
        name: KnownModel(_QWEN25_32B, "config.json of Qwen/Qwen2.5-32B", *_QWEN)
        for name in ("Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-32B-Instruct")
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": KnownModel(
        _SMOLLM2_135M, "config.json of HuggingFaceTB/SmolLM2-135M-Instruct", *_SMOLLM2
    ),
}
"""By their names on the Hub."""

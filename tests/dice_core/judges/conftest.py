"""Tiny reward models in the forms that Skywork-Reward-V2 comes in: random weights, one label, SmolLM2's tokenizer."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama_reward_model(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Llama for sequence classification with one label."""
    return make_reward_model("llama", smollm, tmp_path_factory.mktemp("reward-llama"))


@pytest.fixture(scope="session")
def qwen3_reward_model(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Qwen3 for sequence classification with one label."""
    return make_reward_model("qwen3", smollm, tmp_path_factory.mktemp("reward-qwen3"))


def make_reward_model(family: str, smollm: Path, folder: Path, num_labels: int = 1) -> Path:
    """Make a reward model whose template, as that of Llama 3, begins with a BOS that the tokenizer adds as well."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForSequenceClassification,
        Qwen3Config,
        Qwen3ForSequenceClassification,
    )

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    if family == "llama":
        tokenizer.bos_token = "<repo_name>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<repo_name> $A", special_tokens=[("<repo_name>", tokenizer.bos_token_id)]
        )
        tokenizer.chat_template = "{{ bos_token }}" + (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
        )
    else:
        # As Qwen's: the model cards' way to a single BOS would take SmolLM2's <|im_start|> for one.
        tokenizer.bos_token = None
    torch.manual_seed(1)
    kinds = {
        "llama": (LlamaConfig, LlamaForSequenceClassification, {}),
        "qwen3": (Qwen3Config, Qwen3ForSequenceClassification, {"head_dim": 32}),
    }
    config_class, model_class, more = kinds[family]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        num_labels=num_labels,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # As Llama 3's: what ends an exchange is its padding too.
        pad_token_id=tokenizer.eos_token_id if family == "llama" else tokenizer.unk_token_id,
        **more,
    )
    model = model_class(config)
    with torch.no_grad():
        # Random weights make all texts alike.
        model.score.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""A model folder with random weights and a tokenizer of its own: nothing is downloaded."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu import random_model

NUM_SPECIAL = 3
"""Ids 0, 1 and 2: begin, end, padding."""


def write_model(folder: Path, shape: Mapping[str, int], device: str) -> None:
    """Write a Llama of a shape with random weights in bfloat16, made where that is quick, as a policy to train."""
    from dice_core.models.importing import import_model
    from dice_core.models.saving import save_model

    model = random_model({**shape, **_special_ids()}, device, "bfloat16")
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        save_model(model, _tokenizer(shape), Path(place), "bfloat16")
        import_model(place, str(folder))


def write_config(folder: Path, shape: Mapping[str, int]) -> None:
    """Write the same without weights, for an engine that makes them up."""
    from transformers import LlamaConfig

    config = LlamaConfig(**shape, **_special_ids(), tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    _tokenizer(shape).save_pretrained(folder)


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _tokenizer(shape: Mapping[str, int]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(NUM_SPECIAL, shape["vocab_size"])}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")

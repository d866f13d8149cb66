"""Sampled answers of a model that is in memory, for comparing two policies on the same prompts and random numbers.

transformers' generate and not vLLM: evaluation holds the model already, and a few dozen answers do not pay for the
start of an engine. Responses to train on come from generation.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dice_core.data.chat import ChatFormat
from dice_core.generation.settings import GenerationConfig
from dice_core.models.files import ModelError
from dice_core.models.rotary import reset_positions
from dice_core.settings.seeds import derive_seed

# Fixed, not a setting: which random numbers a prompt gets depends on its place in a batch.
_PROMPTS_PER_BATCH = 32


@dataclass(frozen=True)
class Answer:
    """A response's text, stripped, and whether the token limit ended it."""

    text: str
    is_cut: bool


def sample_answers(
    model: Any,
    template: ChatFormat,
    prompts: Sequence[str],
    *,
    generation: GenerationConfig,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Sample one answer to each prompt, in order.

    Two models of one architecture draw the same random numbers, so the same weights give the same answers.

    Args:
        model: transformers.PreTrainedModel in evaluation mode.
        template: the chat format of its tokenizer.
        prompts: texts of persons.
        generation: temperature, top_p and repetition_penalty are read.
        stop_ids: each ends an answer (`generation.responses.stop_token_ids`).
        max_new_tokens: of an answer, end-of-turn token included.
        seed: of all draws.
        on_progress: called with (prompts answered, all prompts) after each batch.

    Raises:
        PromptTooLongError: a prompt exceeds chat.max_prompt_tokens.
        ModelError: the model gives no probabilities to sample from.
    """
    answers: list[Answer] = []
    devices = [model.device] if model.device.type == "cuda" else []
    settings = _sampling(generation, stop_ids, max_new_tokens)
    for start in range(0, len(prompts), _PROMPTS_PER_BATCH):
        ids = [template.prompt_token_ids(prompt) for prompt in prompts[start : start + _PROMPTS_PER_BATCH]]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(seed, "answers", start))
            rows = _generate(model, ids, settings, stop_ids[0])
        answers += [_answer(row, stop_ids, template) for row in rows]
        if on_progress:
            on_progress(len(answers), len(prompts))
    return answers


def _sampling(generation: GenerationConfig, stop_ids: tuple[int, ...], max_new_tokens: int) -> Any:
    from transformers import GenerationConfig as Sampling

    return Sampling(
        do_sample=True,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=0,  # transformers' own default keeps the 50 likeliest tokens only
        repetition_penalty=generation.repetition_penalty,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        use_cache=True,
    )


def _generate(model: Any, prompts: list[list[int]], settings: Any, pad_id: int) -> list[list[int]]:
    """Return the new token ids of each prompt, padding included. Prompts are padded on the left."""
    width = max(len(ids) for ids in prompts)
    padding = [width - len(ids) for ids in prompts]
    # Both (prompts, width).
    input_ids = torch.tensor([[pad_id] * pad + ids for pad, ids in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    # generate() fills what a configuration leaves open from the model's own: replaced, so that nothing else decides.
    own, model.generation_config = model.generation_config, settings
    reset_positions(model)
    try:
        with torch.inference_mode():
            output = model.generate(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device))
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ModelError(
            "the probabilities of the next token are not finite numbers while answers are sampled: the model is broken"
        ) from None
    finally:
        model.generation_config = own
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _answer(row: list[int], stop_ids: tuple[int, ...], template: ChatFormat) -> Answer:
    end = next((i for i, token_id in enumerate(row) if token_id in stop_ids), None)
    return Answer(template.decode_response(row[:end]), is_cut=end is None)

"""Settings of the data: how rows are checked and split, and how a prompt becomes token ids."""

import datetime
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from dice_core.settings.base import Int, Settings


class ChatConfig(Settings):
    """How a prompt becomes token ids. One format for generation, pairs and evaluation of a run."""

    prompt_format: Literal["model", "zephyr", "llama3"] = "model"
    """`model` is the tokenizer's own chat template; the others are the formats upstream DICE used."""
    system_prompt: str = ""
    """Only for `model`; empty means no system message. The zephyr format has its one space built in."""
    max_prompt_tokens: Int = Field(default=2048, ge=1)
    """A longer prompt is dropped and counted by prepare-data, and an error anywhere else; never cut."""
    date: str = "2024-07-26"
    """Today, for templates that tell the model the date (Llama 3, Mistral, gpt-oss): one date for the whole run, so
    that its tokens do not depend on the clock. The default is the date of Llama 3's template, which has it for want of
    another."""
    enable_thinking: bool = False
    """Passed to templates that know it (Qwen3 and its like)."""

    @field_validator("date")
    @classmethod
    def _date_is_iso(cls, value: str) -> str:
        try:
            datetime.date.fromisoformat(value)
        except ValueError:
            raise ValueError("must be a date such as 2024-07-26") from None
        return value

    @model_validator(mode="after")
    def _system_prompt_needs_model_format(self) -> Self:
        if self.system_prompt and self.prompt_format != "model":
            raise ValueError(f"system_prompt is allowed only with prompt_format 'model', got {self.prompt_format!r}")
        return self


class DataConfig(Settings):
    """prepare-data: checks and splits the user's prompts and preference pairs."""

    num_held_out: Int = Field(default=256, ge=1)
    """Preference pairs kept aside for evaluation; they are never replayed."""
    max_prompts: Int = Field(default=0, ge=0)
    """Random subset of the prompts (seeded); 0 takes all."""
    max_preferences: Int = Field(default=0, ge=0)
    """Random subset of the pairs beside the held-out ones (seeded), and so of their prompts; 0 takes all."""
    max_response_characters: Int = Field(default=20_000, ge=1)
    """Preference pairs with a longer chosen or rejected text are dropped and counted."""
    system_prompts: Literal["drop", "ignore"] = "drop"
    """Rows with a system prompt of their own are dropped and counted, or read without it and counted as cleaned: every
    prompt then gets chat.system_prompt."""
    repeated_prompts: Literal["strip", "drop", "keep"] = "strip"
    """What becomes of an answer that repeats its prompt in front of itself: a question, or 20 characters and more, word
    for word. It loses it, and is counted as cleaned; or its row is dropped and counted; or it stays as it is."""
    control_tokens: Literal["drop", "keep"] = "drop"
    """Rows whose text has control tokens of a chat template, such as <|im_end|>, are dropped and counted, or kept. Such
    text is most often templated already. What is kept is tokenised as plain characters."""
    decontamination_words: Int = Field(default=13, ge=2)
    """A prompt that shares a run of so many words with a prompt of the benchmarks given is dropped and counted."""

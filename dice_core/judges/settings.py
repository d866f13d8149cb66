"""Settings of judges: who compares two answers, who grades one, and what an endpoint may cost."""

from typing import Literal

from pydantic import Field, model_validator

from dice_core.generation.settings import EngineConfig
from dice_core.models.files import ModelKind
from dice_core.settings.base import OPERATIONAL, Int

Judge = Literal["none", "reward-model", "chat-logprob", "endpoint"]


class JudgeModelConfig(EngineConfig):
    """A model that judges: in vLLM, where its source is a parameter of the run, or behind an endpoint."""

    max_length: Int = Field(default=8192, ge=128)
    """Most tokens that it reads at a time, answers and instructions together; its own context, where that is shorter. A
    comparison that is longer is missing, and counted."""
    endpoint_url: str = ""
    """Of a server that speaks OpenAI's API, such as https://api.example.com/v1."""
    endpoint_model: str = ""
    """The model's name there."""
    endpoint_key_variable: str = Field(default="DICE_JUDGE_API_KEY", json_schema_extra=OPERATIONAL)
    """Environment variable with the key, which a secret fills (cluster.env_secret). Empty: the server asks for none."""
    endpoint_concurrency: Int = Field(default=8, ge=1, json_schema_extra=OPERATIONAL)
    """Requests that are under way at a time."""
    endpoint_timeout: Int = Field(default=120, ge=1, json_schema_extra=OPERATIONAL)
    """Seconds that one request may take."""
    endpoint_retries: Int = Field(default=8, ge=0, json_schema_extra=OPERATIONAL)
    """Further attempts of a request, after growing pauses or those the server asks for; then its verdict is missing."""
    endpoint_input_price: float = Field(default=0, ge=0, json_schema_extra=OPERATIONAL)
    """Of a million tokens sent, in any currency: what judging cost is reported in it."""
    endpoint_output_price: float = Field(default=0, ge=0, json_schema_extra=OPERATIONAL)
    """Of a million tokens that come back."""
    endpoint_max_cost: float = Field(default=0, ge=0, json_schema_extra=OPERATIONAL)
    """Judging stops before a stage's requests cost more, those of earlier attempts included; 0: no limit. What has been
    paid for is kept: with a higher limit the same run goes on."""

    @model_validator(mode="after")
    def _a_limit_needs_prices(self) -> "JudgeModelConfig":
        if self.endpoint_max_cost and not (self.endpoint_input_price or self.endpoint_output_price):
            raise ValueError(
                "endpoint_max_cost needs endpoint_input_price and endpoint_output_price, or nothing would be counted, "
                f"got a limit of {self.endpoint_max_cost:g} and no price"
            )
        if self.endpoint_url and not self.endpoint_url.startswith(("http://", "https://")):
            raise ValueError(
                f"endpoint_url must be http:// or https://, such as https://api.example.com/v1, got "
                f"{self.endpoint_url!r}"
            )
        if set("@?#") & set(self.endpoint_url):
            raise ValueError(
                "endpoint_url must hold no name, password or query, for it is shown: a key belongs into the variable "
                "of endpoint_key_variable"
            )
        return self


class JudgingConfig(JudgeModelConfig):
    """Who compares the answers of two policies."""

    judge: Judge = "none"
    """reward-model: a sequence classification model, one score an answer. chat-logprob: a chat model in vLLM, by the
    probabilities of the two answer letters. endpoint: the same through OpenAI's API. The model of the first two is
    judge_source. none: no answers are compared."""
    min_label_mass: float = Field(default=0.5, ge=0, le=1)
    """A verdict is missing where the judge gives the two answer letters less probability than this together."""

    @property
    def model_kind(self) -> ModelKind | None:
        """What the judge's own model has to be; None: the judge is no model of this suite's storage."""
        kinds: dict[str, ModelKind] = {"reward-model": "reward-model", "chat-logprob": "language-model"}
        return kinds.get(self.judge)


class GradingConfig(JudgeModelConfig):
    """How a judge grades answers one by one, for rewards: samples of an additive scale from 0 to 5."""

    num_grades: Int = Field(default=7, ge=1)
    """Samples for each answer; their mean is its grade."""
    min_grades: Int = Field(default=3, ge=1)
    """Samples that must have a grade from 0 to 5, or the answer has none."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the samples."""
    max_new_tokens: Int = Field(default=512, ge=1)
    """Of a sample, which explains itself before it grades."""

    @model_validator(mode="after")
    def _enough_samples(self) -> "GradingConfig":
        if self.min_grades > self.num_grades:
            raise ValueError(
                f"min_grades must not exceed num_grades {self.num_grades}, or no answer would have a grade, got "
                f"{self.min_grades}"
            )
        return self

"""Settings of evaluation: what is measured of a new policy, and when it is accepted."""

from typing import Literal

from pydantic import Field

from dice_core.settings.base import OPERATIONAL, DType, Int, Settings


class EvaluationConfig(Settings):
    """What is measured of a new policy, and when it is accepted."""

    dtype: DType = "bfloat16"
    """Precision of the weights."""
    num_sample_prompts: Int = Field(default=16, ge=1)
    """Held-out prompts that both policies answer, for the length gate and for people to read."""
    num_shown_samples: Int = Field(default=6, ge=1)
    """Pairs of answers that the report shows side by side."""
    max_new_tokens: Int = Field(default=0, ge=0)
    """Longest answer, in tokens; 0: generation.max_new_tokens. Fewer take less time, but the length gate sees no growth
    beyond them."""
    max_length_growth: float = Field(default=0.5, gt=0)
    """The new policy is refused when its mean answer is longer by more than this share."""
    max_accuracy_drop: float = Field(default=0.05, ge=0, le=1)
    """The new policy is refused when its held-out implicit-reward accuracy falls by more than this."""
    tokens_per_batch: Int = Field(default=16384, ge=64, json_schema_extra=OPERATIONAL)
    """Tokens of one forward pass. Fewer take less memory."""
    promote: Literal["auto", "manual"] = Field(default="auto", json_schema_extra=OPERATIONAL)
    """What becomes of a better policy: `auto` moves the promoted pointer to it, `manual` proposes it to a person, who
    does that with `dice promote`."""
    registered_model: str = Field(default="", pattern=r"""^[^'"/:]*$""", json_schema_extra=OPERATIONAL)
    """Name of the model in MLflow's registry, where MLFLOW_TRACKING_URI is set; empty: that of the promoted pointer."""

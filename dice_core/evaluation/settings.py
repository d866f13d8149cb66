"""Settings of evaluation: what is measured of a new policy, when it is accepted, and when it is better."""

from typing import Literal

from pydantic import Field

from dice_core.settings.base import OPERATIONAL, DType, Int, Settings


class EvaluationConfig(Settings):
    """What is measured of a new policy, when it is accepted, and when it is better."""

    dtype: DType = "bfloat16"
    """Precision of the weights."""
    num_sample_prompts: Int = Field(default=16, ge=1)
    """Held-out prompts that both models answer: for the judge, the guards and for people to read. A judge's win rate on
    805 of them shows 4 points, on 3,400 of them 2."""
    num_shown_samples: Int = Field(default=6, ge=1)
    """Pairs of answers that the report shows side by side."""
    max_new_tokens: Int = Field(default=0, ge=0)
    """Longest answer, in tokens; 0: generation.max_new_tokens. Fewer take less time, but the length gate sees no growth
    beyond them."""
    wanted_difference: float = Field(default=0.04, gt=0, lt=0.5)
    """A gain worth seeing: the verdict says how many prompts (without a judge: held-out pairs) would show it. 0.04 of
    win rate is a small step of the paper's, whose iterations gain 2 to 10 points."""
    num_candidates: Int = Field(default=1, ge=1)
    """Candidates of which the best is taken, such as several alphas of `dice extrapolate`, each with as many chances to
    look better: the interval of what decides is widened to hold for all of them together (Bonferroni)."""
    max_length_growth: float = Field(default=0.5, gt=0)
    """The new policy is refused when its mean answer is longer by more than this share."""
    max_accuracy_drop: float = Field(default=0.05, ge=0, le=1)
    """The new policy is refused when its held-out implicit-reward accuracy falls by more than this."""
    max_cut_growth: float = Field(default=0.2, gt=0, le=1)
    """The new policy is refused when the limit of tokens cuts a share of its answers that is larger by more than
    this."""
    max_drift_per_token: float = Field(default=0.5, gt=0)
    """The new policy is refused when its answers are likelier than under the run's first policy by more nats per token
    than this. At 0.5 each token is 1.6 times as likely: about half of a chat model's own entropy has gone."""
    min_parsed_verdicts: float = Field(default=0.95, gt=0, le=1)
    """Share of comparisons with a verdict, below which nothing is promoted."""
    tokens_per_batch: Int = Field(default=16384, ge=64, json_schema_extra=OPERATIONAL)
    """Tokens of one forward pass. Fewer take less memory."""
    promote: Literal["auto", "manual"] = Field(default="auto", json_schema_extra=OPERATIONAL)
    """What becomes of a better policy: `auto` moves the promoted pointer to it, `manual` proposes it to a person, who
    does that with `dice promote`."""
    registered_model: str = Field(default="", pattern=r"""^[^'"/:]*$""", json_schema_extra=OPERATIONAL)
    """Name of the model in MLflow's registry, where MLFLOW_TRACKING_URI is set; empty: that of the promoted pointer."""

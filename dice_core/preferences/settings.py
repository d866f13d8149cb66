"""Settings of the preferences: sampling, scoring, and pairing."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dice_core.settings.base import OPERATIONAL, DType, Int, Settings


class ScoringConfig(Settings):
    """Which responses are valid, how their log-probs are computed, and what ranks them."""

    reward: Literal["implicit", "reward-model", "judge"] = "implicit"
    """What ranks the responses of a prompt: `implicit` is DICE's, from the log-probs of the policy and the one before
    it; `reward-model` a sequence classification model; `judge` a chat model that grades each response from 0 to 5. The
    log-probs are computed in either case: training starts from them, and the report compares both rewards."""

    min_characters: Int = Field(default=4, ge=0)
    """Shortest valid response, stripped. Upstream keeps 3 < characters (generate_dpo_scores.py)."""
    max_characters: Int = Field(default=6699, ge=1)
    """Longest valid response, stripped. Upstream keeps characters < 6700."""
    min_valid_responses: Int = Field(default=8, ge=2)
    """A prompt with fewer is dropped: before scoring, of responses within the limits above; after it, of responses
    whose log-probs are finite numbers. Upstream's n_least_score."""
    dtype: DType = "bfloat16"
    """Precision of the weights; log-softmax and sums are always float32."""
    tokens_per_batch: Int = Field(default=16384, ge=64, json_schema_extra=OPERATIONAL)
    """Tokens of one forward pass. Fewer take less memory."""

    @model_validator(mode="after")
    def _character_range_is_not_empty(self) -> Self:
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters must not exceed max_characters, got {self.min_characters} and {self.max_characters}"
            )
        return self


class PairingConfig(Settings):
    """Length penalty, selection of the best and the worst response, replay of offline pairs."""

    selection: Literal["best-worst", "mu-2sigma", "margin"] = "best-worst"
    """Which responses of a prompt become its pair, by length-regularised reward.

    `best-worst` takes the highest and the lowest; `mu-2sigma` the highest and the one nearest to the mean minus two
    standard deviations, for many responses a prompt; `margin` is best-worst of the prompts with the largest margins."""
    margin_share: float = Field(default=0.25, gt=0, le=1)
    """Share of the prompts that selection `margin` keeps; 0.25 is that of arXiv 2502.14560."""
    length_penalty: Literal["exact", "grid"] | float = "exact"
    """`exact` balances lengths by the zero crossing of the gap, `grid` by upstream's grid (0, 0.001, ... < 1).

    A number is used as it is, in the unit of the reward per unit of length. That of the implicit reward is nats, on the
    scale without beta: paper alpha / beta."""
    length_unit: Literal["characters", "tokens"] = "characters"
    """What the length of a response counts."""
    replay_ratio: float = Field(default=0.5, ge=0, le=1)
    """gamma: share of offline pairs in the training set."""
    num_eval_pairs: Int = Field(default=576, ge=0)
    """Pairs kept aside to watch the loss, a tenth of all at most; upstream's val_size."""

    @model_validator(mode="after")
    def _margin_share_has_an_effect(self) -> Self:
        default = type(self).model_fields["margin_share"].default
        if self.selection != "margin" and self.margin_share != default:
            raise ValueError(f"margin_share has no effect with selection {self.selection!r}: use selection 'margin'")
        return self

"""How many tokens each stage runs: arithmetic on settings, counts and mean lengths. Loads no torch.

Lengths of sampled responses are taken as exponential: with a limit m and a mean mu without one, the mean is
mu (1 - exp(-m / mu)), and exp(-m / mu) of them are cut. Measured on the demo's kind of prompts: the mean of 57 tokens
under a limit of 96 comes with 30 % of the responses cut, by the formula with 29 %.
"""

import math
from dataclasses import dataclass

from dice_core.training.batches import MAX_MEASURED, MIN_MEASURED
from dice_core.training.settings import TrainingConfig
from pipelines.planning.data_counts import DataCounts
from pipelines.planning.ranges import Range
from pipelines.presets import Preset


def limited_mean(mean: float, limit: int) -> float:
    """Return the mean of exponential lengths when a limit cuts them."""
    return mean * share_uncut(mean, limit)


def share_uncut(mean: float, limit: int) -> float:
    """Return the share of responses that end by themselves."""
    return -math.expm1(-limit / mean)


def mean_uncut(mean: float, limit: int) -> float:
    """Return the mean length of those that end by themselves."""
    ratio = limit / mean
    # Half of the limit where hardly one ends: there the difference of two large numbers would say nothing.
    return limit * (0.5 - ratio / 12) if ratio < 1e-3 else mean - limit / math.expm1(min(ratio, 700))


def num_scored(num_prompts: int, num_responses: int, uncut: float, least: int) -> float:
    """Return the responses of prompts that have enough valid ones: binomial, K draws each."""
    if uncut == 1:
        return float(num_prompts * num_responses) if num_responses >= least else 0.0
    # In logarithms: of thousands of draws there are more choices than a float can tell.
    chances = (
        k * math.exp(_log_choices(num_responses, k) + k * math.log(uncut) + (num_responses - k) * math.log1p(-uncut))
        for k in range(least, num_responses + 1)
    )
    return num_prompts * sum(chances)


def _log_choices(number: int, chosen: int) -> float:
    return math.lgamma(number + 1) - math.lgamma(chosen + 1) - math.lgamma(number - chosen + 1)


@dataclass(frozen=True)
class Tokens:
    """Tokens of forwards: all of them, and those of responses, which the output head meets too."""

    all: Range
    of_responses: Range

    def __add__(self, other: "Tokens") -> "Tokens":
        """Add both."""
        return Tokens(self.all + other.all, self.of_responses + other.of_responses)

    def times(self, factor: float) -> "Tokens":
        """Multiply both."""
        return Tokens(self.all * factor, self.of_responses * factor)


@dataclass(frozen=True)
class Workload:
    """What a run's settings and data make of each stage; `response_tokens` is the mean without a limit."""

    preset: Preset
    data: DataCounts
    response_tokens: Range

    @property
    def sampled_length(self) -> Range:
        """Return the mean length of a sampled response."""
        limit = self.preset.generation.max_new_tokens
        return Range(limited_mean(self.response_tokens.low, limit), limited_mean(self.response_tokens.high, limit))

    @property
    def answer_length(self) -> Range:
        """Return the mean length of an answer in evaluation."""
        limit = self.preset.evaluation.max_new_tokens or self.preset.generation.max_new_tokens
        return Range(limited_mean(self.response_tokens.low, limit), limited_mean(self.response_tokens.high, limit))

    def generated(self) -> Tokens:
        """Return what all shards of an iteration sample: prompts once, then every response."""
        prompts = self.data.lengths.prompt * self.data.num_prompts
        responses = self.sampled_length * (self.data.num_prompts * self.preset.generation.num_responses)
        return Tokens(prompts + responses, responses)

    def scored(self) -> Tokens:
        """Return what one model scores in an iteration, all shards together: a prompt once for its responses."""
        limit, settings = self.preset.generation.max_new_tokens, self.preset.scoring
        bounds = []
        # A longer mean has more responses cut: fewer of them are scored.
        for mean in (self.response_tokens.low, self.response_tokens.high):
            number = num_scored(
                self.data.num_prompts,
                self.preset.generation.num_responses,
                share_uncut(mean, limit),
                settings.min_valid_responses,
            )
            bounds.append(number * mean_uncut(mean, limit))
        responses = Range(min(bounds), max(bounds))
        return Tokens(self.data.lengths.prompt * self.data.num_prompts + responses, responses)

    def pair(self, *, is_warm_start: bool) -> Tokens:
        """Return the mean pair that is trained on: the prompt once, and both responses."""
        offline = self.data.lengths.response
        share = 1.0 if is_warm_start else self.preset.pairing.replay_ratio
        limit = self.preset.generation.max_new_tokens
        low, high = (mean_uncut(mean, limit) for mean in (self.response_tokens.low, self.response_tokens.high))
        response = offline * share + Range(low, high) * (1 - share)
        return Tokens(self.data.lengths.prompt + response * 2, response * 2)

    def num_pairs(self, *, is_warm_start: bool) -> int:
        """Return the pairs of a training, those that are watched among them.

        As the mix of replay: offline pairs alone, or so many generated ones that replay keeps its share.
        """
        if is_warm_start or self.preset.is_offline:
            return self.data.num_preferences
        gamma, available = self.preset.pairing.replay_ratio, self.data.num_prompts
        generated = min(int(self.data.num_preferences * (1 - gamma)), available)
        return generated + int(gamma * generated / (1 - gamma))

    def num_eval_pairs(self, *, is_warm_start: bool) -> int:
        """Return the pairs kept aside to watch the loss: a tenth at most."""
        return min(self.preset.pairing.num_eval_pairs, self.num_pairs(is_warm_start=is_warm_start) // 10)

    def trained(self, config: TrainingConfig, *, is_warm_start: bool) -> Tokens:
        """Return what training runs forward and backward."""
        return self.pair(is_warm_start=is_warm_start).times(config.max_steps * config.global_batch_size)

    def measured(self, config: TrainingConfig, *, is_warm_start: bool) -> Tokens:
        """Return what training runs forward alone: references, the measured pairs twice, the watched ones again."""
        steps_pairs = config.max_steps * config.global_batch_size
        pairs, watched = self.num_pairs(is_warm_start=is_warm_start), self.num_eval_pairs(is_warm_start=is_warm_start)
        measured = min(MAX_MEASURED, max(MIN_MEASURED, steps_pairs // 8))
        is_reused = config.reference == "start" and config.reference_logps == "reuse" and not is_warm_start
        unknown = min(pairs, steps_pairs + watched) * (self.preset.pairing.replay_ratio if is_reused else 1.0)
        times_watched = config.max_steps // config.eval_steps
        return self.pair(is_warm_start=is_warm_start).times(unknown + 2 * measured + watched * times_watched)

    def answers(self) -> Tokens:
        """Return what one model's answers of an evaluation are: one to a prompt."""
        number = min(self.preset.evaluation.num_sample_prompts, self.data.num_held_out)
        responses = self.answer_length * number
        return Tokens(self.data.lengths.prompt * number + responses, responses)

    def held_out(self) -> Tokens:
        """Return what one model scores of the held-out pairs."""
        responses = self.data.lengths.response * (2 * self.data.num_held_out)
        return Tokens(self.data.lengths.prompt * self.data.num_held_out + responses, responses)

    def largest_row(self, config: TrainingConfig, *, is_warm_start: bool) -> float:
        """Return the tokens of the largest row that training may meet: the longest pair's, or as many mean ones."""
        pair = self.pair(is_warm_start=is_warm_start)
        prompt = self.data.lengths.prompt.low
        many = config.per_device_batch_size * pair.all.high
        return min(max(2 * config.max_length - prompt, many), 2 * config.max_length * config.per_device_batch_size)

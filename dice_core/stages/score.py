"""Stage score: the implicit rewards of a shard's valid responses."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dice_core.data import records
from dice_core.preferences.reward import implicit_reward
from dice_core.preferences.settings import ScoringConfig
from dice_core.progress import Progress, doing
from dice_core.settings.base import Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.models_agree import require_one_tokenizer, tell_same_weights
from dice_core.stages.parts import part_name, published_behind, read_input, stored_parts
from dice_core.stages.run_settings import Task
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import SCORE
from dice_core.storage.manifest import Manifest, Metric
from dice_core.storage.transfers import read_ahead

if TYPE_CHECKING:
    from dice_core.preferences.scoring import Filtered

# Parts of responses on their way while one is scored, which takes much longer.
_NUM_AHEAD = 2


@leaves_reason(SCORE)
def score(
    policy_uri: str,
    reference_uri: str,
    responses_uri: str,
    output_uri: str,
    *,
    scoring: Values = None,
    overwrite: bool = False,
) -> StageReport:
    """Compute the log-probs of valid responses under policy and reference: their difference is the implicit reward.

    Args:
        policy_uri: the model that made the responses, pi_{t-1}.
        reference_uri: the model before it, pi_{t-2}.
        responses_uri: a shard of generate, or a Parquet file (records.RESPONSES).
        output_uri: where the scores go, as part-00000-DIGEST.parquet and so on.
        scoring: settings, see ScoringConfig.
        overwrite: first delete what this stage left at its output.
    """
    config = ScoringConfig.parse(scoring, "scoring")
    return run_stage(
        SCORE,
        output_uri,
        partial(_score_parts, config=config),
        settings={"scoring": config},
        arguments={},
        overwrite=overwrite,
        inputs={"policy": policy_uri, "reference": reference_uri, "responses": responses_uri},
    )


def _score_parts(context: StageContext, *, config: ScoringConfig) -> Manifest:
    """Filter the responses, and score the parts that are not stored yet."""
    from dice_core.models.cache import fetch_model
    from dice_core.preferences.scoring import score_parts

    context.inputs["responses"].require_same("policy", context.inputs["policy"])
    require_one_tokenizer(context, "policy", ("reference",))
    tell_same_weights(context, "policy", "reference")
    names, counts = context.inputs["responses"].tables(), _Counts()
    wanted = [index for index in range(len(names)) if part_name(index) not in context.parts]
    for name, table in stored_parts(context, records.SCORES):
        counts.add_scores(name, table)
    # Lazily: a shard's responses need not fit in memory. Parts already scored are read for their counts alone.
    valid = context.until_end(_valid_parts(context, names, wanted, config, counts))
    if wanted:
        policy, reference = (fetch_model(context.inputs[name].uri) for name in ("policy", "reference"))
        files = context.inputs["responses"].manifest.files
        progress = _PartsProgress([files[name].num_rows or 0 for name in names], wanted)
        parts = score_parts(policy, reference, progress.begun(valid), config, on_progress=progress)
        with doing("loading the models"), published_behind(context, records.SCORES, counts.add_scores) as publish:
            for index, table in parts:
                publish(index, table)
    for _ in valid:
        pass
    return context.publish({}, {**counts.metrics(), "seconds": context.seconds()})


class _PartsProgress:
    """Counts the responses of all parts, those of an earlier attempt and those that are dropped among them."""

    def __init__(self, sizes: list[int], wanted: list[int]) -> None:
        self._sizes, self._progress = sizes, Progress("score", "responses")
        self._num_before, self._num_now = sum(sizes) - sum(sizes[index] for index in wanted), 0

    def begun(self, parts: Iterable[tuple[int, pa.Table]]) -> Iterator[tuple[int, pa.Table]]:
        """Yield the parts, and take note of each that begins."""
        for index, table in parts:
            self._num_before, self._num_now = self._num_before + self._num_now, self._sizes[index]
            yield index, table

    def __call__(self, num_done: int, num_all: int) -> None:
        """Take how much of the part is done."""
        self._progress(self._num_before + self._num_now * num_done // num_all, sum(self._sizes))


@dataclass
class _Counts:
    """What the parts of a shard add up to. A part that an earlier attempt stored counts as one of this attempt."""

    num_dropped: Counter[str] = field(default_factory=Counter)
    """Responses dropped before scoring, by reason."""
    num_valid: Counter[str] = field(default_factory=Counter)
    """Responses that went into scoring, by prompt."""
    num_scored: Counter[str] = field(default_factory=Counter)
    """Responses that came out of it, by prompt."""
    rewards: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Of each part."""

    def add_responses(self, filtered: "Filtered") -> None:
        """Count a part before scoring."""
        self.num_dropped.update(filtered.num_dropped)
        self.num_valid.update(filtered.responses["prompt_id"].to_pylist())

    def add_scores(self, name: str, scores: pa.Table) -> None:
        """Count a scored part."""
        self.num_scored.update(scores["prompt_id"].to_pylist())
        self.rewards[name] = implicit_reward(scores["policy_logps"], scores["reference_logps"])

    def metrics(self) -> dict[str, Metric]:
        """Return the numbers of the whole shard; each dropped response has one reason."""
        # In the parts' order: the sums then do not depend on which attempt scored which part.
        rewards = np.concatenate([[], *(self.rewards[name] for name in sorted(self.rewards))])
        num_few = sum(count for prompt, count in self.num_valid.items() if prompt not in self.num_scored)
        return {
            "num_scored": rewards.size,
            **{f"num_dropped_{reason}": count for reason, count in self.num_dropped.items()},
            "num_dropped_non_finite": self.num_valid.total() - num_few - rewards.size,
            "num_dropped_few_finite_responses": num_few,
            "reward_mean": float(rewards.mean()) if rewards.size else 0.0,
            "reward_std": float(rewards.std()) if rewards.size else 0.0,
        }


def _valid_parts(
    context: StageContext, names: list[str], wanted: list[int], config: ScoringConfig, counts: _Counts
) -> Generator[tuple[int, pa.Table], None, None]:
    from dice_core.preferences.scoring import filter_responses

    def read(name: str) -> "Filtered":
        return filter_responses(read_input(context, context.inputs["responses"], records.RESPONSES, name), config)

    for index, filtered in enumerate(read_ahead(read, names, _NUM_AHEAD)):
        counts.add_responses(filtered)
        if index in wanted:
            yield index, filtered.responses


def score_in_run(task: Task, policy_uri: str, reference_uri: str, responses_uri: str) -> StageReport:
    """Score a shard's responses at their place in a run; see score."""
    return score(policy_uri, reference_uri, responses_uri, task.uri, **task.settings(SCORE))

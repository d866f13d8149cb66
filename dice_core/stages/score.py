"""Stage score: the implicit rewards of a shard's valid responses."""

from collections import Counter
from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dice_core.data import records
from dice_core.preferences.settings import ScoringConfig
from dice_core.progress import Progress
from dice_core.settings.base import Values
from dice_core.stages.parts import part_name, published_behind, read_input, stored_parts
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import SCORE
from dice_core.storage.manifest import Manifest, Metric
from dice_core.storage.transfers import read_ahead

if TYPE_CHECKING:
    from dice_core.preferences.scoring import Filtered

# Parts of responses on their way while one is scored, which takes much longer.
_NUM_AHEAD = 2


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
        policy_uri: pi_{t-1}, which made the responses.
        reference_uri: pi_{t-2}.
        responses_uri: a shard of generate, or a Parquet file (records.RESPONSES).
        output_uri: gets part-00000.parquet and so on (records.SCORES).
        scoring: ScoringConfig.
        overwrite: delete what this stage left at its output before.
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

    dropped: Counter[str] = Counter()
    names = context.inputs["responses"].tables()
    wanted = [index for index in range(len(names)) if part_name(index) not in context.parts]
    rewards: dict[str, np.ndarray] = {}
    for name, table in stored_parts(context, records.SCORES):
        _keep_rewards(rewards, name, table)
    # Lazily: a shard's responses need not fit in memory. Parts already scored are read for their counts alone.
    valid = context.until_end(_valid_parts(context, names, wanted, config, dropped))
    if wanted:
        policy, reference = (fetch_model(context.inputs[name].uri) for name in ("policy", "reference"))
        progress = Progress("score", "responses")
        with published_behind(context, records.SCORES, partial(_keep_rewards, rewards)) as publish:
            for index, table, _ in score_parts(policy, reference, valid, config, on_progress=progress):
                publish(index, table)
    for _ in valid:
        pass
    all_rewards = np.concatenate([[], *(rewards[name] for name in sorted(rewards))])
    num_valid = dropped.pop("valid", 0)
    metrics: dict[str, Metric] = {
        "num_scored": all_rewards.size,
        **{f"num_dropped_{reason}": count for reason, count in dropped.items()},
        "num_dropped_non_finite": num_valid - all_rewards.size,
        "reward_mean": float(all_rewards.mean()) if all_rewards.size else 0.0,
        "reward_std": float(all_rewards.std()) if all_rewards.size else 0.0,
    }
    return context.publish({}, {**metrics, "seconds": context.seconds()})


def _keep_rewards(rewards: dict[str, np.ndarray], name: str, scores: pa.Table) -> None:
    rewards[name] = np.asarray(scores["policy_logps"]) - np.asarray(scores["reference_logps"])


def _valid_parts(
    context: StageContext, names: list[str], wanted: list[int], config: ScoringConfig, counts: Counter[str]
) -> Generator[tuple[int, pa.Table], None, None]:
    from dice_core.preferences.scoring import filter_responses

    def read(name: str) -> "Filtered":
        return filter_responses(read_input(context, context.inputs["responses"], records.RESPONSES, name), config)

    for index, filtered in enumerate(read_ahead(read, names, _NUM_AHEAD)):
        counts.update({**filtered.num_dropped, "valid": filtered.responses.num_rows})
        if index in wanted:
            yield index, filtered.responses

"""The policy's log-probs as generation recorded them, in place of a forward pass, and the check that they may be taken.

vLLM's kernels are not those that score the reference, and what differs between the two goes into every reward. So a
sample is scored both ways first. Which responses are scored at all is scoring.py's business.
"""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dice_core.data.records import RecordError
from dice_core.preferences.settings import ScoringConfig
from dice_core.progress import log

if TYPE_CHECKING:
    from collections.abc import Callable

    Score = Callable[[pa.Table], np.ndarray]


def recorded_logps(responses: pa.Table) -> np.ndarray:
    """Return the recorded log-probs of all responses, float64, nats.

    Raises:
        RecordError: generation did not keep them.
    """
    column = responses["policy_logps"]
    if column.null_count:
        raise RecordError(
            f"scoring.policy_logps: 'generation' needs policy_logps of all responses, {column.null_count} of "
            f"{len(column)} have none: generate with generation.policy_logps true, or set it to 'forward'"
        )
    return column.to_numpy()


def sample_rows(responses: pa.Table, num_rows: int) -> np.ndarray:
    """Return rows of whole prompts, spread evenly over the table, until there are so many."""
    prompts = np.asarray(responses["prompt_id"].combine_chunks().dictionary_encode().indices)
    num_prompts = int(prompts.max(initial=-1)) + 1
    sizes = np.bincount(prompts, minlength=num_prompts)
    # One prompt more than the mean size asks for costs little; one less would check too few.
    wanted = min(num_prompts, int(np.ceil(num_rows / sizes.mean())) if num_prompts else 0)
    chosen = np.unique(np.linspace(0, num_prompts - 1, wanted).astype(int)) if wanted else np.zeros(0, int)
    return np.flatnonzero(np.isin(prompts, chosen))


def check_recorded(responses: pa.Table, score: "Score", config: ScoringConfig) -> None:
    """Compare recorded log-probs with those of a forward pass on a sample.

    Args:
        responses: of the schema RESPONSES.
        score: returns the policy's log-probs of some responses by a forward pass.
        config: how many are compared, and the bound.

    Raises:
        RecordError: there are none, or one differs by more than the bound.
    """
    recorded = recorded_logps(responses)
    rows = sample_rows(responses, config.num_checked_responses)
    difference = np.abs(recorded[rows] - score(responses.take(pa.array(rows))))
    largest, rms = float(difference.max(initial=0.0)), float(np.sqrt(np.square(difference).mean()))
    if not largest <= config.max_logps_difference:
        raise RecordError(
            f"scoring.policy_logps: vLLM's log-probs and a forward pass differ by up to {largest:.3g} nats in "
            f"{len(rows)} responses (root mean square {rms:.3g}), scoring.max_logps_difference allows "
            f"{config.max_logps_difference:g}: set scoring.policy_logps 'forward', or generate and score in float32"
        )
    log(f"score: vLLM's log-probs are taken: within {largest:.2g} nats of a forward pass in {len(rows)} responses")

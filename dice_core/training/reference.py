"""Log-probs of the pairs under a reference that is not the policy as it starts: one pass before training.

`trainer.py` makes the pass of the usual reference itself, which is the model that it trains.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from dice_core.accelerator import free_bytes
from dice_core.logprobs.forward import PromptGroup, group_logps
from dice_core.models import placement
from dice_core.models.files import ModelError
from dice_core.models.loading import load_model, move
from dice_core.settings.base import DType
from dice_core.training import ranks
from dice_core.training.batches import TrainingPairs
from dice_core.training.settings import TrainingConfig

_ADVICE = "each process holds the whole reference on its GPU: train with reference 'start', or on larger GPUs"


def with_reference(
    pairs: TrainingPairs,
    folder: Path,
    config: TrainingConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainingPairs:
    """Return the pairs with their log-probs under a model, which is gone afterwards.

    Every process loads the whole model, takes a share of the pairs, and gets all results.

    Args:
        pairs: what they know of a reference is replaced.
        folder: of fetch_model.
        config: precision is read; `bf16` loads the weights in bfloat16.
        on_progress: called with (responses done, all responses) of this process.

    Raises:
        ModelError: the model cannot be loaded, or a log-prob is no finite number.
    """
    mine = pairs.all[ranks.rank() :: ranks.num_processes()]
    groups = [
        PromptGroup(pair.prompt_token_ids.tolist(), [pair.chosen_token_ids.tolist(), pair.rejected_token_ids.tolist()])
        for pair in mine
    ]
    dtype: DType = "bfloat16" if config.precision == "bf16" else "float32"
    with whole_models():
        model = load_model(folder, dtype)
    # What training holds with gradients, a pass without them can hold too.
    tokens = max(pair.num_tokens for pair in pairs.all)
    free, working = free_bytes([str(ranks.device())]), placement.working_bytes(model, tokens)
    placement.bring(model, placement.lay_out_alone(model, free, working, _ADVICE))
    found = group_logps(model, groups, tokens_per_batch=tokens, on_progress=on_progress)
    move(model, "cpu")
    del model
    by_index = dict(zip((pair.index for pair in mine), found, strict=True))
    everything = {index: logps for part in ranks.gather(by_index) for index, logps in part.items()}
    logps = np.array([everything[pair.index] for pair in pairs.all], dtype=np.float64)  # (train + eval pairs, 2)
    if not np.isfinite(logps).all():
        odd = next(pair.prompt_id for pair, row in zip(pairs.all, logps, strict=True) if not np.isfinite(row).all())
        raise ModelError(
            f"{folder}: log-probs of the pair of prompt {odd} are not finite numbers under the reference: take another "
            "reference, or leave out that pair"
        )
    return replace(pairs, reference_logps=logps)


@contextmanager
def whole_models() -> Iterator[None]:
    """Load models whole, though transformers would cut them up for the ZeRO-3 of the training that follows."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config

"""The lines of metrics.jsonl, and handing them on while training goes.

One function makes a line from what the Trainer logs, for the file and for whoever follows the training.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerState

Values = dict[str, float | None]


def metric_lines(history: Iterable[Mapping[str, Any]], passes_per_step: float) -> Iterator[Values]:
    """Yield the lines of a Trainer's history as metrics.jsonl has them, without its last one, a summary.

    Args:
        history: `log_history` of the Trainer's state.
        passes_per_step: the share of the training pairs that a step sees.
    """
    for line in history:
        if "train_loss" not in line:
            # The Trainer sees one epoch, for the order of the pairs is fixed: passes over the pairs instead.
            values = {**line, "epoch": round(line["step"] * passes_per_step, 4)}
            yield {name: _finite_or_none(value) for name, value in values.items()}


def _finite_or_none(value: float | None) -> float | None:
    """Return None for a missing or non-finite number: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


class LiveMetrics(TrainerCallback):
    """Hands each line on when it is logged; those that a checkpoint kept come first. For process 0 alone."""

    def __init__(self, put: Callable[[int, Values], None], passes_per_step: float) -> None:
        """Take what gets a step and its values, and what metric_lines needs."""
        self._put, self._passes_per_step, self._num_seen = put, passes_per_step, 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Hand on what an earlier attempt logged."""
        self._hand_on(state)

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Hand on the new line."""
        self._hand_on(state)

    def _hand_on(self, state: TrainerState) -> None:
        new = state.log_history[self._num_seen :]
        self._num_seen += len(new)
        for line in metric_lines(new, self._passes_per_step):
            self._put(int(line.pop("step") or 0), line)

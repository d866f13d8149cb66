"""How fast training goes and what memory it takes: in every line of the log, and totals at its end."""

import functools
import math
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dice_core.progress import Throttle, log, pace
from dice_core.storage.manifest import Metric
from dice_core.training import ranks
from dice_core.training.batches import TrainingPair


class _Work:
    """What one process has done: seconds of training steps, the steps, and the tokens run."""

    def __init__(self) -> None:
        self.seconds, self.num_steps, self.num_tokens, self.num_response_tokens = 0.0, 0, 0, 0


class Speedometer(TrainerCallback):
    """Measures tokens per second over training steps alone: reference pass, evaluation and checkpoints do not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing measured.

        Args:
            clock: returns seconds.
        """
        self._clock = clock
        self._throttle = Throttle(5.0)
        self._step_start = 0.0
        self._first_step: tuple[float, int] | None = None
        """When this attempt began its first step, and how many an earlier one had made."""
        self._all, self._since = _Work(), _Work()

    def count(self, pairs: Sequence[TrainingPair]) -> None:
        """Count pairs that have run forward and backward, or are about to."""
        num_tokens = sum(pair.num_tokens for pair in pairs)
        num_prompt_tokens = sum(len(pair.prompt_token_ids) for pair in pairs)
        for work in (self._all, self._since):
            work.num_tokens += num_tokens
            work.num_response_tokens += num_tokens - num_prompt_tokens

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start the clock of a step."""
        self._step_start = self._clock()
        self._first_step = self._first_step or (self._step_start, state.global_step)

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop the clock of a step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = self._clock() - self._step_start
        for work in (self._all, self._since):
            work.seconds += seconds
            work.num_steps += 1

    def since_last_line(self, policy: PreTrainedModel) -> dict[str, float]:
        """Return tokens_per_second and on GPUs mfu since the last call, and peak_memory_bytes. All processes call."""
        work, self._since = self._since, _Work()
        return _numbers(work, policy)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Print a line of training, at most one in five seconds, and every evaluation."""
        values = logs or {}
        prefix = "" if "loss" in values else "eval_"
        is_last = state.global_step >= state.max_steps
        if f"{prefix}loss" not in values or not state.is_world_process_zero:
            return
        if prefix or is_last or self._throttle.is_due():
            log(
                f"train: step {state.global_step} of {state.max_steps}{' (eval pairs)' if prefix else ''}: "
                f"loss {values[f'{prefix}loss']:.4f}, reward accuracy {values[f'{prefix}rewards/accuracies']:.2f}, "
                f"margin {values[f'{prefix}rewards/margins']:.4f}{_speed_text(values)}{self._time_left(state)}"
            )

    def _time_left(self, state: TrainerState) -> str:
        """Return how long the steps still take, with what lies between them (evaluation, checkpoints)."""
        if self._first_step is None:
            return ""
        start, num_before = self._first_step
        return pace(state.global_step - num_before, self._clock() - start, state.max_steps - state.global_step)

    def totals(self, policy: PreTrainedModel) -> dict[str, Metric]:
        """Return the numbers of a line for the whole run, and the seconds of a step. Every process calls it."""
        seconds_per_step = self._all.seconds / max(self._all.num_steps, 1)
        return {
            **_numbers(self._all, policy),
            "seconds_per_step": round(seconds_per_step, 3),
            "num_processes": ranks.num_processes(),
        }


def _speed_text(values: Mapping[str, float]) -> str:
    if "tokens_per_second" not in values:
        return ""
    mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
    return f", {values['tokens_per_second']:,.0f} tokens/s{mfu}, {values['peak_memory_bytes'] / 2**30:.1f} GiB"


def _numbers(work: _Work, policy: PreTrainedModel) -> dict[str, float]:
    num_tokens, num_response_tokens, memory = zip(
        *ranks.gather((work.num_tokens, work.num_response_tokens, _peak_memory_bytes())), strict=True
    )
    seconds = work.seconds or float("inf")
    numbers = {"tokens_per_second": round(sum(num_tokens) / seconds, 1), "peak_memory_bytes": max(memory)}
    if torch.cuda.is_available():
        # Forward, backward to the inputs, backward to the weights that are trained; what is computed again is none.
        done = sum(
            passes * num_operations(policy, sum(num_tokens), sum(num_response_tokens), trained=trained)
            for passes, trained in ((2, False), (1, True))
        )
        numbers["mfu"] = round(done / seconds / (ranks.num_processes() * matmul_peak()), 4)
    return numbers


def num_operations(model: PreTrainedModel, num_tokens: int, num_response_tokens: int, *, trained: bool = False) -> int:
    """Return the operations of a forward's matrix products, attention apart: 2 a weight and token.

    Every token meets the layers, a response's the output head as well; the input embedding is no product.

    Args:
        model: any, also one with adapters.
        num_tokens: of all rows.
        num_response_tokens: of those.
        trained: count the weights that are trained alone.
    """

    def size(weights: Iterable[torch.Tensor]) -> int:
        return sum(_size(weight) for weight in weights if weight.requires_grad or not trained)

    head = size([model.get_output_embeddings().weight])
    embedding = size([model.get_input_embeddings().get_parameter("weight")])
    layers = size(model.get_decoder().parameters()) - embedding
    return 2 * (layers * num_tokens + head * num_response_tokens)


def _size(weight: torch.Tensor) -> int:
    # Under ZeRO-3 a parameter holds no elements of its own; ds_numel is the whole one's. One of 4 bits holds half as
    # many bytes as it has weights.
    shape = getattr(getattr(weight, "quant_state", None), "shape", None)
    return math.prod(shape) if shape else int(getattr(weight, "ds_numel", weight.numel()))


@functools.cache
def matmul_peak() -> float:
    """Return this GPU's measured bfloat16 matrix-multiplication speed, operations per second."""
    size, repeats = 8192, 10
    # Each (size, size).
    left, right = (torch.randn(size, size, device=ranks.device(), dtype=torch.bfloat16) for _ in range(2))
    left @ right
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.monotonic() - start)


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

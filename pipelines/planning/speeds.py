"""How fast a preset's devices do each kind of work: cited figures for a kind of GPU, measured ones for this machine."""

from dataclasses import dataclass

from dice_core.generation.settings import EngineConfig
from dice_core.settings.base import DType
from pipelines.planning import rates
from pipelines.planning.machine import MachineSpeed
from pipelines.planning.memory import BYTES, engine_limits, engine_memory
from pipelines.planning.ranges import Range, exactly
from pipelines.planning.rates import Card, Rate
from pipelines.planning.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What the time of every stage follows from. Rates are of one device, times of one process."""

    forward: Range
    """Operations a second of scoring."""
    training: Range
    """Operations a second of training, forward and backward alike; what is computed again does not count."""
    storage: Range
    """Bytes a second between a pod and S3."""
    importing: Range
    """Bytes a second of bringing and checking a model."""
    start: Range
    """Seconds until a task's program runs: its pod, or its process."""
    imports: Range
    """Seconds more until torch and transformers are loaded."""
    model_start: Range
    """Seconds to load a model for log-probs, and to compile its attention."""
    training_start: Range
    """Seconds more of a training: its own pods or processes, and the finished model, checked and stored."""
    engine_start: Range
    """Seconds until vLLM answers."""
    rates: tuple[Rate, ...]
    """What was taken, for the person who reads the plan."""


def gpu_speeds(card: Card) -> Speeds:
    """Return the speeds on a kind of GPU."""
    return Speeds(
        forward=rates.FORWARD_UTILIZATION.value * card.operations,
        training=card.utilization.value * card.operations,
        storage=rates.STORAGE.value,
        # Into the pod, through its checks, and out again.
        importing=rates.STORAGE.value / 3,
        start=rates.POD_START.value,
        imports=rates.IMPORTS.value,
        model_start=rates.LOADING.value + rates.COMPILATION.value,
        training_start=rates.POD_START.value + rates.LOADING.value,
        engine_start=rates.ENGINE_START.value,
        rates=(card.utilization, *rates.GPU_RATES),
    )


def gpu_decoding(
    shape: ModelShape, config: EngineConfig, card: Card, device_bytes: float, mean_tokens: Range, longest: int
) -> Range:
    """Return the tokens a second that one engine samples: each step reads the weights and all running sequences' cache.

    Args:
        shape: of the model.
        config: of the engine.
        card: with its bandwidth.
        device_bytes: of its memory.
        mean_tokens: of a running sequence, prompt and half of the response.
        longest: tokens of the longest request.
    """
    size, num_gpus = BYTES[config.dtype], config.tensor_parallel_size
    memory = engine_memory(shape, config, longest, device_bytes=device_bytes)
    per_token = shape.kv_bytes_per_token(size, num_gpus)

    def tokens_a_second(mean: float, efficiency: float) -> float:
        running = max(1.0, min(engine_limits(config, device_bytes)[0], memory.cache / per_token / mean))
        return running * card.bandwidth * efficiency / (memory.weights + running * mean * per_token)

    efficiency = rates.DECODING.value
    return Range(tokens_a_second(mean_tokens.high, efficiency.low), tokens_a_second(mean_tokens.low, efficiency.high))


def cpu_speeds(machine: MachineSpeed, dtype: DType, training_dtype: DType) -> Speeds:
    """Return the speeds of this machine: shares of its measured matrix products, and multiples of its import.

    Args:
        machine: measured.
        dtype: of scoring.
        training_dtype: of training: bfloat16 stands for autocast.
    """
    scale = machine.import_seconds / rates.REFERENCE_IMPORT_SECONDS

    def about(rate: Rate, factor: float) -> Range:
        return rate.value * factor

    return Speeds(
        forward=about(rates.CPU_FORWARD[dtype], machine.of(dtype)),
        training=about(rates.CPU_TRAINING[training_dtype], machine.of(training_dtype)),
        storage=rates.CPU_STORAGE.value,
        importing=about(rates.CPU_IMPORTING, 1 / scale),
        start=about(rates.CPU_START, scale),
        imports=about(rates.CPU_IMPORTS, scale),
        model_start=about(rates.CPU_MODEL_START, scale),
        training_start=about(rates.CPU_TRAINING_START, scale),
        engine_start=about(rates.CPU_ENGINE_START, scale),
        rates=(
            Rate(
                "this machine's products of matrices",
                exactly(machine.of(training_dtype)),
                f"operations/s in {training_dtype}",
                "measured",
                "now, in half a second",
            ),
            Rate("this machine's import of torch", exactly(machine.import_seconds), "s", "measured", "now"),
            rates.CPU_FORWARD[dtype],
            rates.CPU_TRAINING[training_dtype],
            rates.CPU_DECODING[dtype],
            *rates.CPU_TIMES,
        ),
    )


def cpu_decoding(shape: ModelShape, machine: MachineSpeed, dtype: DType) -> Range:
    """Return the tokens a second that vLLM samples on this machine, as a share of its matrix products."""
    operations = shape.forward_operations(1, 1)
    return rates.CPU_DECODING[dtype].value * (machine.of(dtype) / operations)

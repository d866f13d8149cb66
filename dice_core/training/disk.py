"""How much of its disk a node needs for training, from the model's size. Pure arithmetic; loads no torch."""

import math

from dice_core.training.settings import TrainingConfig

BYTES_PER_STATE = 12
"""Of a parameter in a checkpoint: the float32 weight and AdamW's two moments. ZeRO-3 was measured at 12.0."""
_ADAPTER_SHARE = 0.001
"""Of a model's parameters, adapters of rank 1 have so many at most: 0.0003 of Llama-3-8B's, 0.0006 of Llama-3.2-1B's.
In smaller models it is more, and little beside _BASE_BYTES."""
_MOST_OF_ADAPTERS = 2.0
"""Of a model's parameters, for both matrices of an adapter whose rank is a layer's own: 1.3 of Llama-3-8B's at 4096."""
_NUM_CHECKPOINTS = 2
"""The finished one, and the one that is written."""
_BASE_BYTES = 4 << 30
"""Pairs, logs, and what else is small beside a model."""


def checkpoint_bytes(num_parameters: int, config: TrainingConfig, num_nodes: int) -> int:
    """Return the bytes of one node's part of a checkpoint; without DeepSpeed the first node writes the whole.

    It holds what is trained: frozen weights are left out.
    """
    per_parameter = BYTES_PER_STATE
    if config.ema_decay:
        per_parameter += 4
    if config.deepspeed == "zero2":
        per_parameter += 2  # the first process adds the bfloat16 weights
    shared = num_nodes if config.deepspeed != "none" else 1
    return -(-_num_trained(num_parameters, config) * per_parameter // shared)


def _num_trained(num_parameters: int, config: TrainingConfig) -> int:
    """Return how many parameters are trained: all, or at most those of adapters on all layers."""
    if not config.lora_rank:
        return num_parameters
    return math.ceil(min(_ADAPTER_SHARE * config.lora_rank, _MOST_OF_ADAPTERS) * num_parameters)


def node_bytes(
    num_parameters: int, config: TrainingConfig, num_nodes: int, *, has_scratch_volume: bool, has_cache_volume: bool
) -> int:
    """Return what a training pod takes of the disk that its node's kubelet counts.

    Args:
        num_parameters: of the model.
        config: of the training.
        num_nodes: that train together.
        has_scratch_volume: checkpoints and the finished model go to a volume.
        has_cache_volume: the policy is fetched to a volume.
    """
    saved_bytes = 2 if config.saved_dtype == "bfloat16" else 4
    total = _BASE_BYTES
    if not has_scratch_volume:
        total += _NUM_CHECKPOINTS * checkpoint_bytes(num_parameters, config, num_nodes) + saved_bytes * num_parameters
        if config.lora_rank:
            total += 4 * _num_trained(num_parameters, config)  # the adapters beside it, in float32
    if not has_cache_volume:
        total += 4 * num_parameters  # at most: float32
    return total


def most_parameters(disk_bytes: float) -> float:
    """Return how many parameters a model may have whose training fits one node's disk, with the presets' settings."""
    return max(0.0, disk_bytes - _BASE_BYTES) / (_NUM_CHECKPOINTS * BYTES_PER_STATE + 2)

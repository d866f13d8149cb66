"""How much of its node's memory a training pod needs, from the model's size. Pure arithmetic; loads no torch."""

from dice_core.training.disk import BYTES_PER_STATE, checkpoint_bytes
from dice_core.training.settings import TrainingConfig

BYTES_OF_OFFLOADED_STATES = 18
"""Of a trained parameter, over all nodes, as DeepSpeed allocates them: the float32 weight, AdamW's two moments and a
float32 gradient for the update (16), and what backward gathers, in the precision of training (2 in bfloat16). Measured:
18.0."""
_BYTES_TO_FINISH = 8
"""Of a parameter, on the first node: the whole float32 weights, and those that training began with to compare."""
_PROCESS_BYTES = 4 << 30
"""Python, torch, CUDA's context and NCCL, of one process."""


def pod_bytes(num_parameters: int, config: TrainingConfig, num_nodes: int, processes_per_node: int) -> int:
    """Return the most memory that a training pod holds: the first one's, when it saves the finished model.

    Optimizer states in memory and the copy of the last checkpoint are there until then. What ZeRO-2 and training
    without DeepSpeed hold while they load the model is not counted.

    Args:
        num_parameters: of the model.
        config: of the training.
        num_nodes: that train together.
        processes_per_node: a GPU each.
    """
    copied = checkpoint_bytes(num_parameters, config, num_nodes)
    # Of the parameters that are trained, as a checkpoint is.
    offloaded = copied * BYTES_OF_OFFLOADED_STATES // BYTES_PER_STATE if config.offload_optimizer == "cpu" else 0
    saved_bytes = 2 if config.saved_dtype == "bfloat16" else 4
    return offloaded + copied + num_parameters * (_BYTES_TO_FINISH + saved_bytes) + processes_per_node * _PROCESS_BYTES

"""How much memory a training pod needs, by hand."""

from dice_core.training.host_memory import pod_bytes
from dice_core.training.settings import TrainingConfig

LLAMA3, LLAMA3_70B = 8_030_261_248, 70_553_706_496
GIB = 1 << 30


def test_a_pod_holds_the_copy_of_a_checkpoint_and_the_finished_model() -> None:
    """12 bytes a parameter of the checkpoint, 4 trained, 4 to compare with, 2 as they are saved."""
    assert pod_bytes(LLAMA3, TrainingConfig(deepspeed="zero3"), 1, 8) == 22 * LLAMA3 + 32 * GIB


def test_two_nodes_share_the_states_that_are_kept_in_memory() -> None:
    config = TrainingConfig(deepspeed="zero3", offload_optimizer="cpu")
    assert pod_bytes(LLAMA3_70B, config, 2, 8) == (9 + 6 + 10) * LLAMA3_70B + 32 * GIB
    # A p5 node has 2048 GiB, a p4de node 1152.
    assert 1674 * GIB < pod_bytes(LLAMA3_70B, config, 2, 8) < 1676 * GIB

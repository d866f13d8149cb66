"""How much of its disk a node needs, by hand."""

from dice_core.training.disk import checkpoint_bytes, most_parameters, node_bytes
from dice_core.training.settings import TrainingConfig

LLAMA3 = 8_030_261_248
GIB = 1 << 30


def test_a_checkpoint_of_llama_3_takes_96_gb_and_each_of_two_nodes_half() -> None:
    zero3 = TrainingConfig(deepspeed="zero3")
    assert checkpoint_bytes(LLAMA3, zero3, 1) == 12 * LLAMA3
    assert checkpoint_bytes(LLAMA3, zero3, 2) == 6 * LLAMA3
    assert checkpoint_bytes(LLAMA3, TrainingConfig(), 2) == 12 * LLAMA3, "without DeepSpeed one process writes it"
    assert checkpoint_bytes(100, TrainingConfig(ema_decay=0.9), 1) == 1600


def test_a_node_holds_two_checkpoints_the_model_and_the_policy() -> None:
    zero3 = TrainingConfig(deepspeed="zero3")
    whole = node_bytes(LLAMA3, zero3, 1, has_scratch_volume=False, has_cache_volume=False)
    assert whole == 4 * GIB + (24 + 2 + 4) * LLAMA3
    assert node_bytes(LLAMA3, zero3, 1, has_scratch_volume=True, has_cache_volume=True) == 4 * GIB
    assert most_parameters(node_bytes(LLAMA3, zero3, 1, has_scratch_volume=False, has_cache_volume=True)) == LLAMA3


def test_a_checkpoint_of_adapters_is_small() -> None:
    # Rank 16 on all of Llama-3-8B's linear layers, by hand: 41,943,040 parameters.
    lora = TrainingConfig(lora_rank=16, deepspeed="zero3")
    assert 12 * 41_943_040 < checkpoint_bytes(LLAMA3, lora, 1) < 4 * 12 * 41_943_040
    whole = node_bytes(LLAMA3, lora, 1, has_scratch_volume=False, has_cache_volume=False)
    assert 4 * GIB + 6 * LLAMA3 < whole < 4 * GIB + 6.5 * LLAMA3
    # Rank 4096: 256 times the parameters by hand, more than the model itself has.
    assert 12 * 256 * 41_943_040 < checkpoint_bytes(LLAMA3, TrainingConfig(lora_rank=4096), 1) == 24 * LLAMA3

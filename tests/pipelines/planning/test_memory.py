"""Memory: figures worked by hand, published ones, and how it grows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.generation.settings import GenerationConfig
from dice_core.training.settings import TrainingConfig
from pipelines.planning import memory
from pipelines.planning.find_model import find_model
from pipelines.planning.memory import GIB, Memory
from pipelines.planning.shapes import ModelShape

MISTRAL = find_model("HuggingFaceH4/zephyr-7b-beta").shape
ROUND = ModelShape(
    num_parameters=7_500_000_000,
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11_008,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    vocab_size=32_000,
    ties_embeddings=False,
)


def config(deepspeed: str = "zero3", **more: object) -> TrainingConfig:
    return TrainingConfig.parse({"deepspeed": deepspeed, "precision": "bf16", **more}, "training")


def states(taken: Memory) -> float:
    return taken.weights + taken.gradients + taken.optimizer


@pytest.mark.parametrize(("deepspeed", "gigabytes"), [("zero2", 16.6), ("zero3", 1.9)])
def test_states_are_those_of_the_zero_paper(deepspeed: str, gigabytes: float) -> None:
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters, 64 processes."""
    assert states(memory.training_memory(ROUND, config(deepspeed), 64, 1)) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_without_deepspeed_a_process_holds_16_bytes_a_parameter() -> None:
    assert states(memory.training_memory(ROUND, config("none"), 8, 1)) == 16 * 7.5e9


def test_adapters_of_llama_3_8b_are_as_many_as_peft_counts() -> None:
    """Rank 16 on all seven products: 41,943,040 trainable parameters, as PEFT prints for this model."""
    shape = find_model("meta-llama/Meta-Llama-3-8B").shape
    assert memory.num_trained(shape, config(lora_rank=16)) == 41_943_040
    # Rank 8 on q_proj and v_proj, its default for Llama: 32 x 8 x (4096 + 4096 + 4096 + 1024).
    some = config(lora_rank=8, lora_target_modules=["q_proj", "v_proj"])
    assert memory.num_trained(shape, some) == 3_407_872
    assert memory.num_trained(shape, config()) == shape.num_parameters


def test_a_layer_by_another_name_counts_as_the_largest() -> None:
    """Of Mistral-7B: rank x (4,096 + 14,336) in each of 32 layers."""
    assert memory.num_trained(MISTRAL, config(lora_rank=16, lora_target_modules=["out"])) == 32 * 16 * (4096 + 14_336)


@pytest.mark.parametrize("deepspeed", ["none", "zero2", "zero3"])
def test_adapters_leave_states_for_what_is_trained_alone(deepspeed: str) -> None:
    full, adapters = (memory.training_memory(MISTRAL, config(deepspeed, lora_rank=rank), 8, 1000) for rank in (0, 16))
    assert adapters.optimizer < 0.01 * full.optimizer and adapters.gradients < 0.01 * full.gradients
    assert adapters.activations == full.activations
    assert states(adapters) < states(full)
    # Frozen weights are bfloat16.
    assert adapters.weights == pytest.approx(2 * 7_241_732_096 / (8 if deepspeed == "zero3" else 1), rel=0.03)


def test_four_bits_take_little_more_than_a_quarter_of_bfloat16() -> None:
    quantised = config("none", lora_rank=16, quantize_base="nf4", reference_logps="recompute")
    whole = config("none", lora_rank=16)
    ratio = memory.frozen_bytes(MISTRAL, quantised) / memory.frozen_bytes(MISTRAL, whole)
    assert 0.25 < ratio < 0.32


def test_offloaded_states_leave_a_gpu_its_share_of_the_weights() -> None:
    taken = memory.training_memory(ROUND, config(offload_optimizer="cpu"), 8, 1)
    assert (taken.weights, taken.gradients, taken.optimizer) == (2 * 7.5e9 / 8, 0, 0)


@given(st.sampled_from(["zero2", "zero3"]), st.integers(1, 64), st.integers(1, 10_000))
def test_ranks_share_states_exactly_and_nothing_grows_with_them(deepspeed: str, ranks: int, row: int) -> None:
    alone, shared = (memory.training_memory(ROUND, config(deepspeed), number, row) for number in (1, ranks))
    assert shared.optimizer * ranks == pytest.approx(alone.optimizer)
    assert shared.gradients * ranks == pytest.approx(alone.gradients)
    assert shared.weights * (ranks if deepspeed == "zero3" else 1) == pytest.approx(alone.weights)
    assert shared.total <= alone.total


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.booleans())
def test_activations_grow_with_the_row_and_checkpointing_keeps_fewer(one: int, other: int, checkpoints: bool) -> None:
    settings = config(gradient_checkpointing=checkpoints)
    small, large = (memory.activation_bytes(MISTRAL, settings, row) for row in sorted((one, other)))
    assert small <= large
    assert memory.activation_bytes(MISTRAL, config(gradient_checkpointing=True), one) < memory.activation_bytes(
        MISTRAL, config(gradient_checkpointing=False), one
    )


def test_activations_worked_by_hand() -> None:
    """SmolLM2 in float32: a layer keeps 4 x 576 + 960 + 768 + 576 + 2 x 1536 = 7680 values a token, 30 layers."""
    shape = find_model("HuggingFaceTB/SmolLM2-135M-Instruct").shape
    settings = config("none", precision="float32", gradient_checkpointing=False)
    assert memory.activation_bytes(shape, settings, 1000) == 1000 * 30 * 7680 * 4


# mosaicml/llm-foundry, scripts/train/benchmarking/README.md: MPT with full shard and activation checkpointing. Its
# MLP has two products where a Llama's has three.
@pytest.mark.parametrize(
    ("parameters", "hidden", "layers", "gpus", "tokens", "card"),
    [
        (6_658_859_008, 4096, 32, 8, 12 * 2048, 40),
        (6_667_247_616, 4096, 32, 8, 6 * 4096, 40),
        (12_853_954_560, 5120, 40, 8, 4 * 2048, 40),
        (29_975_214_080, 7168, 48, 32, 4 * 2048, 40),
        (64_862_437_376, 8192, 80, 64, 2 * 2048, 40),
        (29_989_894_144, 7168, 48, 8, 1 * 4096, 80),
        (12_864_440_320, 5120, 40, 8, 10 * 4096, 80),
    ],
)
def test_what_others_have_trained_on_a_card_fits_it(
    parameters: int, hidden: int, layers: int, gpus: int, tokens: int, card: int
) -> None:
    shape = ModelShape(
        num_parameters=parameters,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_heads=hidden // 128,
        num_kv_heads=hidden // 128,
        head_size=128,
        vocab_size=50_368,
        ties_embeddings=True,
    )
    taken = memory.training_memory(shape, config(), gpus, tokens)
    # FSDP's buffers are others than DeepSpeed's.
    assert states(taken) + taken.activations + memory.GPU_LIBRARIES < card * GIB


def test_what_cannot_be_trained_on_a_card_does_not_fit_it() -> None:
    """Sixteen bytes of 30 billion parameters are 60 GB of each of 8: the table above has no such row for 40 GB."""
    assert memory.training_memory(find_model("Qwen/Qwen2.5-32B").shape, config(), 8, 2048).total > 40 * GIB


def test_an_engine_takes_its_share_of_the_card_and_its_cache_is_what_is_left() -> None:
    taken = memory.engine_memory(MISTRAL, GenerationConfig(), 4096, device_bytes=40 * GIB)
    assert taken.total == pytest.approx(0.9 * 40 * GIB)
    assert taken.weights == 2 * 7_241_732_096
    assert taken.cache / MISTRAL.kv_bytes_per_token(2) > 256 * 500  # 256 sequences of 500 tokens at a time


def test_an_engine_without_room_for_one_request_needs_more_than_its_share() -> None:
    large = find_model("Qwen/Qwen2.5-32B").shape
    taken = memory.engine_memory(large, GenerationConfig(), 4096, device_bytes=40 * GIB)
    assert taken.total > 0.9 * 40 * GIB
    assert taken.cache == large.kv_bytes_per_token(2) * 4096


@given(st.sampled_from([1, 2, 4, 8]))
def test_gpus_share_the_weights_of_an_engine(number: int) -> None:
    taken = memory.engine_memory(MISTRAL, GenerationConfig(tensor_parallel_size=number), 4096, device_bytes=80 * GIB)
    assert taken.weights * number == 2 * 7_241_732_096


def test_scoring_keeps_both_models_where_they_fit_and_one_where_they_do_not() -> None:
    weights = 2 * 7_241_732_096
    both = memory.scoring_memory(MISTRAL, "bfloat16", 16_384, device_bytes=40 * GIB)
    one = memory.scoring_memory(MISTRAL, "bfloat16", 16_384, device_bytes=24 * GIB)
    spread = memory.scoring_memory(MISTRAL, "bfloat16", 16_384, num_gpus=2, device_bytes=40 * GIB)
    assert (both.weights, one.weights, spread.weights) == (2 * weights, weights, weights)


@pytest.mark.slow
def test_what_is_counted_elsewhere_too_is_counted_alike() -> None:
    """Chunks of logits, and what a forward takes of a card before a model is spread over several."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dice_core.logprobs.output_head import CHUNK_LOGITS
    from dice_core.models.placement import working_bytes

    chunks = {"cpu": 4 * CHUNK_LOGITS["cpu"], "gpu": 4 * CHUNK_LOGITS["cuda"]}
    assert chunks == memory.LOGITS_BYTES
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=100, **sizes)).bfloat16()
    shape = ModelShape(
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        num_layers=1,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=4,
        head_size=16,
        vocab_size=100,
        ties_embeddings=False,
    )
    taken = memory.logprobs_memory(shape, "bfloat16", 16_384)
    context = 1 * GIB
    assert taken.activations + taken.working - context == working_bytes(model, 16_384)

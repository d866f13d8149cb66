"""Presets keep to the published numbers (design: arXiv 2406.09760 and sail-sg/dice)."""

import numpy as np
import pytest

from dice_core.evaluation.estimates import growth
from dice_core.settings.quantities import quantity
from dice_core.stages.table import GENERATE_AND_SCORE
from dice_core.training.host_memory import pod_bytes
from pipelines.cluster.pools import NODE_KINDS
from pipelines.dice import default_parameters
from pipelines.overrides import apply_overrides
from pipelines.presets import PRESETS, Preset, on_this_machine


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_carries_its_own_name(name: str) -> None:
    assert PRESETS[name]().name == name


@pytest.mark.parametrize("name", ["zephyr", "llama3"])
def test_published_presets_have_upstreams_numbers(name: str) -> None:
    preset = PRESETS[name]()
    training, generation, pairing = preset.training, preset.generation, preset.pairing
    assert (preset.iterations, preset.num_shards, generation.num_responses) == (2, 8, 16)
    assert (training.beta, training.learning_rate, training.max_steps, training.max_length) == (0.1, 5e-7, 300, 4096)
    assert training.global_batch_size == 8 * training.per_device_batch_size * training.accumulation_steps(8) == 32
    assert (training.deepspeed, training.precision, preset.launch.processes_per_node) == ("zero3", "bf16", 8)
    assert (pairing.replay_ratio, preset.scoring.min_valid_responses, pairing.num_eval_pairs) == (0.5, 8, 576)
    assert generation.max_new_tokens == 2048


@pytest.mark.parametrize("name", ["zephyr", "llama3"])
def test_the_length_gate_of_the_published_presets_sees_answers_that_have_doubled(name: str) -> None:
    preset = PRESETS[name]()
    evaluation = preset.evaluation
    limit = evaluation.max_new_tokens or preset.generation.max_new_tokens
    for seed in range(20):
        # A question decides most of how long its answers are.
        random = np.random.default_rng(seed)
        lengths = np.exp(random.normal(np.log(300), 0.5, 128) + random.normal(0, 0.4, (2, 128)))
        before, after = np.minimum(lengths[:, : evaluation.num_sample_prompts] * [[1], [2]], limit)
        assert growth(after, before).low > evaluation.max_length_growth


def test_sampling_differs_between_the_published_presets() -> None:
    def sampling(preset: Preset) -> tuple[str, float, float]:
        return preset.chat.prompt_format, preset.generation.temperature, preset.generation.top_p

    assert sampling(PRESETS["zephyr"]()) == ("zephyr", 0.7, 0.9)
    assert sampling(PRESETS["llama3"]()) == ("llama3", 0.9, 1.0)


def test_the_large_preset_fills_two_nodes_with_what_fits_them() -> None:
    """By hand: 70.55 billion parameters, 16 GPUs of 80 GiB, nodes of 2048 GiB."""
    preset, num_parameters = PRESETS["llama3-70b"](), 70_553_706_496
    assert preset.cluster is not None
    num_gpus = preset.launch.num_nodes * preset.launch.processes_per_node
    assert preset.num_shards * preset.gpus_of(GENERATE_AND_SCORE) == num_gpus == 16
    training = preset.training
    assert training.global_batch_size == num_gpus * training.per_device_batch_size * training.accumulation_steps(16)
    assert (training.deepspeed, training.offload_optimizer) == ("zero3", "cpu")
    memory = quantity(preset.cluster.trainer_memory)
    assert pod_bytes(num_parameters, training, 2, 8) < memory < NODE_KINDS["p5"].memory_gib * 2**30
    # Both tasks of a node, and two models in bfloat16 in each.
    assert 2 * quantity(preset.cluster.gpu_task_memory) < memory
    assert quantity(preset.cluster.gpu_task_memory) > 2 * 2 * num_parameters
    assert 2 * int(preset.cluster.gpu_task_cpu) <= NODE_KINDS["p5"].num_cpus
    llama3 = PRESETS["llama3"]()
    differing = {"chat", "generation", "training", "launch", "cluster"}
    assert {name for name, value in preset.sections().items() if value != llama3.sections()[name]} == differing


def test_the_papers_baselines_differ_from_zephyr_in_what_the_paper_says() -> None:
    """Offline pairs alone, against the first reference or against the policy as it starts."""
    zephyr, offline, new = (PRESETS[f"zephyr{end}"]() for end in ("", "-offline", "-offline-new-reference"))
    assert (zephyr.pairing.replay_ratio, offline.pairing.replay_ratio, new.pairing.replay_ratio) == (0.5, 1, 1)
    assert [preset.training.reference for preset in (zephyr, offline, new)] == ["start", "base", "start"]
    assert [preset.is_offline for preset in (zephyr, offline, new)] == [False, True, True]
    assert offline.sections() | {"pairing": 0, "training": 0} == zephyr.sections() | {"pairing": 0, "training": 0}
    assert (offline.pointer, new.pointer) == ("zephyr-offline", "zephyr-offline-new-reference")


def test_the_demo_starts_from_an_sft_model_and_saves_in_float32() -> None:
    """bfloat16 would round the change of so few steps away, and with it the reward of the next iteration."""
    preset = PRESETS["demo"]()
    assert preset.has_warm_start and preset.warm_start_training is not None
    assert {preset.training.saved_dtype, preset.warm_start_training.saved_dtype} == {"float32"}
    assert not PRESETS["zephyr"]().has_warm_start


@pytest.mark.parametrize("name", PRESETS)
def test_a_longer_context_is_trained_on_than_is_generated(name: str) -> None:
    preset = PRESETS[name]()
    assert preset.chat.max_prompt_tokens + preset.generation.max_new_tokens <= preset.training.max_length


@pytest.mark.parametrize(("promote_as", "pointer"), [("", "zephyr"), ("lr-1e-6", "lr-1e-6"), ("none", "")])
def test_an_experiment_moves_a_pointer_of_its_own_or_none(promote_as: str, pointer: str) -> None:
    """A schedule starts from the preset's pointer, which an experiment would move."""
    preset = apply_overrides(PRESETS["zephyr"](), [f"promote_as={promote_as}", "exclude_source=s3://b/x.jsonl"])
    for recurring in (False, True):
        parameters = default_parameters(preset, recurring=recurring)
        assert (parameters["promote_as"], parameters["exclude_source"]) == (pointer, "s3://b/x.jsonl")


def test_a_pointer_that_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="promote_as must be 1 to 63 lower-case letters"):
        default_parameters(apply_overrides(PRESETS["zephyr"](), ["promote_as=My Model"]))


@pytest.mark.parametrize(
    ("name", "changes", "description"),
    [
        ("zephyr", [], "zephyr-7b-beta on ultrafeedback_binarized, 2 iterations, 8 shards, 8 GPUs"),
        (
            "zephyr",
            ["iterations=3", "num_shards=4", "policy_source=s3://bucket/models/mine/"],
            "mine on ultrafeedback_binarized, 3 iterations, 4 shards, 8 GPUs",
        ),
        (
            "llama3",
            ["launch.num_nodes=2", "preferences_source=org/pairs@v1:sub/train"],
            "Llama-3-Base-8B-SFT-DPO on pairs, 2 iterations, 8 shards, 16 GPUs",
        ),
        ("zephyr-offline", [], "zephyr-7b-beta on ultrafeedback_binarized, 2 iterations, offline pairs alone, 8 GPUs"),
        (
            "llama3-70b",
            [],
            "Llama-3.1-Tulu-3-70B-DPO on ultrafeedback_binarized, 2 iterations, 4 shards, 16 GPUs",
        ),
        ("demo", ["iterations=1"], "SmolLM2-135M-Instruct on demo_preferences, 1 iteration, 1 shard, on CPUs"),
    ],
)
def test_a_preset_describes_the_run_that_its_settings_make(name: str, changes: list[str], description: str) -> None:
    assert apply_overrides(PRESETS[name](), changes).description == description


def test_only_a_run_on_this_machine_is_described_so() -> None:
    assert on_this_machine(PRESETS["demo"]()).description.endswith("1 shard, on this machine")

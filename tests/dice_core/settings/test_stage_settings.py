"""Settings: what is refused, in which words, and what a fingerprint covers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.data.settings import ChatConfig, DataConfig
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.preferences.settings import PairingConfig, ScoringConfig
from dice_core.settings.base import ConfigError
from dice_core.settings.seeds import derive_seed
from dice_core.training.settings import TrainingConfig

ALL = [
    ChatConfig,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LaunchConfig,
    PairingConfig,
    PodConfig,
    ScoringConfig,
    TrainingConfig,
]


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (GenerationConfig, {"num_response": 4}, "stage.num_response: unknown setting, did you mean 'num_responses'?"),
        (
            GenerationConfig,
            {"num_responses": 1},
            "stage.num_responses: should be greater than or equal to 2, got 1",
        ),
        (GenerationConfig, {"num_responses": "16"}, 'stage.num_responses: should be a valid integer, got "16"'),
        (GenerationConfig, {"num_responses": 16.5}, "got 16.5"),
        (GenerationConfig, {"temperature": float("nan")}, "stage.temperature: should be a finite number"),
        (GenerationConfig, {"stop_token_ids": [1, "x"]}, "stage.stop_token_ids"),
        (PairingConfig, {"length_penalty": "foo"}, "'exact' or 'grid', or "),
        (PairingConfig, {"replay_ratio": 1.5}, "stage.replay_ratio: should be less than or equal to 1, got 1.5"),
        (TrainingConfig, {"loss": "kto"}, "'sigmoid', 'hinge' or 'ipo', got \"kto\""),
        (TrainingConfig, {"loss": "ipo", "label_smoothing": 0.1}, "defined for loss 'sigmoid' only"),
        (TrainingConfig, {"warmup_steps": 50}, "use 'constant_with_warmup'"),
        (TrainingConfig, {"per_device_batch_size": 64}, "must not exceed global_batch_size 32, got 64"),
        (TrainingConfig, {"ema_decay": 0.9, "deepspeed": "zero3"}, "which deepspeed 'zero3' cuts up: set ema_decay 0"),
        (TrainingConfig, {"offload_optimizer": "cpu", "deepspeed": "zero2"}, "needs deepspeed 'zero3', got 'zero2'"),
        (ScoringConfig, {"min_characters": 10, "max_characters": 9}, "got 10 and 9"),
        (ChatConfig, {"prompt_format": "zephyr", "system_prompt": "Be kind."}, "only with prompt_format 'model'"),
        (PodConfig, {"cpu": "lots"}, 'stage.cpu: must be a Kubernetes quantity such as 8, 500m or 64Gi, got "lots"'),
        (PodConfig, {"memory": "900gb"}, "stage.memory: must be a Kubernetes quantity"),
        (PodConfig, {"shm_size": "big"}, "stage.shm_size: must be a Kubernetes quantity"),
        (
            PodConfig,
            {"labels": {"cost-centre": "a/b"}},
            "stage.labels: the value of cost-centre is up to 63",
        ),
        (TrainingConfig, {"lora_alpha": 8.0}, "stage: lora_alpha has no effect with lora_rank 0: set lora_rank"),
        (TrainingConfig, {"quantize_base": "nf4"}, "stage: quantize_base has no effect with lora_rank 0"),
        (TrainingConfig, {"lora_rank": 8, "quantize_base": "nf4"}, "'nf4' needs reference_logps 'recompute'"),
        (
            TrainingConfig,
            {"lora_rank": 8, "quantize_base": "nf4", "deepspeed": "zero2"},
            "'nf4' needs deepspeed 'none', which would have little to cut up, got 'zero2'",
        ),
        (PodConfig, {"labels": {"team": "a" * 64}}, "stage.labels: the value of team is up to 63 letters"),
        (PodConfig, {"node_selector": {"-pool": "x"}}, "stage.node_selector: a key is a name of up to 63 letters"),
        (PodConfig, {"annotations": {"A_b/c": "anything at all"}}, "stage.annotations: a key is a name of up to 63"),
        (PodConfig, {"tolerations": [{"kei": "x"}]}, "a toleration has the keys effect, key, operator,"),
        (PodConfig, {"tolerations": [{"key": "x", "effect": "No"}]}, "is NoSchedule, PreferNoSchedule or NoExecute"),
    ],
)
def test_a_bad_setting_is_one_line_with_field_value_and_what_is_allowed(cls, values, message):
    with pytest.raises(ConfigError) as error:
        cls.parse(values, "stage")
    text = str(error.value)
    assert message.lower() in text.lower()
    assert "\n" not in text


@pytest.mark.parametrize("cls", ALL)
def test_settings_survive_what_kubeflow_pipelines_does_to_numbers(cls):
    """A dict parameter arrives with every number a float and its keys reordered."""
    plain = cls().to_dict()
    shuffled = {name: float(value) if type(value) is int else value for name, value in reversed(plain.items())}
    received = json.loads(json.dumps(shuffled))
    assert cls.parse(received, "stage") == cls()
    assert cls.parse(received, "stage").fingerprint() == cls().fingerprint()


@pytest.mark.parametrize("cls", ALL)
def test_no_default_is_none_because_kubeflow_pipelines_refuses_it(cls):
    assert None not in cls().to_dict().values()


def test_operational_settings_leave_the_fingerprint_alone():
    assert GenerationConfig(gpu_memory_utilization=0.5).fingerprint() == GenerationConfig().fingerprint()
    assert GenerationConfig(temperature=0.5).fingerprint() != GenerationConfig().fingerprint()


def test_a_setting_that_was_added_leaves_the_fingerprints_of_runs_under_way_alone():
    # Of the class before adapters were added.
    before = "76a1a5ddafa51b1bdbad1f26be783f5e0e78cddba9c2d147773b20200357284f"
    assert TrainingConfig().fingerprint() == before
    assert TrainingConfig(lora_rank=16).fingerprint() != before
    assert TrainingConfig(lora_rank=16).fingerprint() != TrainingConfig(lora_rank=16, lora_alpha=8.0).fingerprint()


def test_the_global_batch_is_split_over_processes():
    config = TrainingConfig(global_batch_size=32, per_device_batch_size=2)
    assert config.accumulation_steps(8) == 2
    with pytest.raises(ConfigError, match=r"multiple of .* 2 x 3 = 6, got 32"):
        config.accumulation_steps(3)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        GenerationConfig().temperature = 1.0


@given(st.lists(st.one_of(st.integers(), st.text()), min_size=1))
def test_seeds_are_stable_31_bit_and_depend_on_every_part(parts):
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**31
    assert seed == derive_seed(*parts)
    assert derive_seed(*parts, "more") != seed


def test_a_seed_is_pinned_so_that_runs_of_two_versions_agree():
    assert derive_seed(0, "generate", 1) == 2106931564

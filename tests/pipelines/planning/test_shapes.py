"""Shapes by their config: published counts of parameters, and where a config comes from."""

import json
from pathlib import Path

import pytest

from dice_core.settings.base import ConfigError
from pipelines.planning.find_model import find_model
from pipelines.planning.known_models import KNOWN_MODELS
from pipelines.planning.shapes import meta_count, shape_of
from pipelines.presets import PRESETS

# Of safetensors' metadata on the Hub, which model cards show.
PUBLISHED = {
    "HuggingFaceH4/zephyr-7b-beta": 7_241_732_096,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Skywork/Skywork-Reward-V2-Qwen3-8B": 8_190_735_360,  # of Qwen3-8B
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_of_the_table_have_the_published_number_of_parameters(name: str) -> None:
    assert find_model(name).shape.num_parameters == PUBLISHED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_formula_counts_what_transformers_builds(name: str) -> None:
    config = KNOWN_MODELS[name].config
    assert shape_of(config, name).num_parameters == meta_count(config, name)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), [("gemma2", {"head_dim": 4}), ("phi3", {"pad_token_id": 0})])
def test_other_decoders_are_counted_as_transformers_builds_them(kind: str, more: dict[str, int]) -> None:
    config = TINY | {"model_type": kind} | more
    assert shape_of(config, kind).num_parameters == meta_count(config, kind) > 0


def test_a_shape_worked_by_hand() -> None:
    """Queries and output 8 x 8, keys and values 8 x 4; MLP 3 x 8 x 16; two norms of 8; embedding and head 10 x 8."""
    shape = shape_of(TINY, "tiny")
    layer = 2 * 64 + 2 * 32 + 3 * 128 + 16
    assert shape.num_parameters == 2 * layer + 8 + 2 * 80
    assert shape.num_layer_weights == 2 * layer + 8
    assert shape.forward_operations(10, 4) == 2 * (10 * (2 * layer + 8) + 4 * 80)
    # Keys and values, 2 layers, 1 head of 4 values, 2 bytes; a head is not cut for a second GPU.
    assert shape.kv_bytes_per_token(2) == shape.kv_bytes_per_token(2, num_gpus=2) == 2 * 2 * 4 * 2


def test_keys_and_values_of_a_token_of_mistral_7b_take_128_kib() -> None:
    assert find_model("HuggingFaceH4/zephyr-7b-beta").shape.kv_bytes_per_token(2) == 128 * 1024


@pytest.mark.parametrize("name", PRESETS)
def test_no_model_of_a_preset_needs_the_hub(name: str) -> None:
    preset = PRESETS[name]()
    for source in (preset.policy_source, preset.reference_source, preset.judge_source):
        assert not source or source in KNOWN_MODELS


def test_a_config_of_a_folder_or_one_that_is_given_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    expected = shape_of(TINY, "tiny")
    assert find_model(str(tmp_path)).shape == expected
    assert find_model("owner/unknown", str(tmp_path / "config.json")).shape == expected
    assert find_model("owner/unknown", str(tmp_path)).shape == expected


def test_a_name_that_is_not_in_the_table_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.planning.find_model.is_hub_out_of_reach", lambda: True)
    with pytest.raises(ConfigError, match=r"owner/unknown: .* give MODEL_CONFIG=path/to/config.json"):
        find_model("owner/unknown")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None}, "names no vocab_size"),
        ({"num_local_experts": 8}, "is a mixture of experts"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of 1 or more, got 0"),
        ({"hidden_size": "4096"}, "hidden_size must be a whole number of 1 or more, got '4096'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number of 1 or more, got 0"),
    ],
)
def test_what_is_no_dense_decoder_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_of(TINY | change, "config.json")


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_model("owner/unknown", str(tmp_path / "config.json"))
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(caught.value)

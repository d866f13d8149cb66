"""A model whose parts do not fit each other is refused at import, with the part's name; what is harmless passes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from dice_core.models.files import ModelError, read_generation_config
from dice_core.models.importing import import_model
from dice_core.models.loading import load_model, load_tokenizer
from dice_core.models.saving import save_model
from dice_core.storage.address import open_storage

pytestmark = pytest.mark.slow

Weights = dict[str, torch.Tensor]


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, place: Path) -> str:
    """Return why a model is refused, in one line; nothing of it stays in storage."""
    with pytest.raises(ModelError) as caught:
        import_model(str(folder), str(place))
    assert "\n" not in str(caught.value)
    assert open_storage(str(place)).list() == []
    return str(caught.value)


# Weights.


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda w: w.pop("model.layers.1.mlp.down_proj.weight"),
            "1 weights are missing .* 'model.layers.1.mlp.down_pro",
        ),
        (lambda w: w.update({"score.weight": torch.zeros(1, 64)}), "1 weights have no place .* 'score.weight'"),
        (
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(128, 64)}),
            "no place .* 'model.layers.2.mlp.up_proj.weight' .* more layers than num_hidden_layers",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(32)}),
            r"another shape .* 'model.norm.weight': \(32,\), not \(64,\)",
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64, dtype=torch.int8)}),
            "'model.layers.0.mlp.up_proj.weight' has dtype I8, so the weights are quantised",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
            "'model.norm.weight' has dtype F8_E4M3, so the weights are quantised",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(49152, 64)}),
            "ties lm_head.weight to model.embed_tokens.weight, and the files have different values",
        ),
    ],
    ids=["missing", "head of a reward model", "another layer", "shape", "packed", "8 bits", "tied and different"],
)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(
    model_copy: Path, tmp_path: Path, change: Callable[[Weights], object], fault: str
) -> None:
    change_weights(model_copy, change)
    assert re.search(fault, refusal(model_copy, tmp_path / "imported"))


def test_tied_weights_and_rotary_frequencies_of_older_files_are_harmless(model_copy: Path, tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change_weights(model_copy, change)
    assert import_model(str(model_copy), str(tmp_path / "imported")).stage == "import-model"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_refused_by_its_tensor(
    model_copy: Path, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    def change(weights: Weights) -> None:
        weights.update({name: weight.to(dtype) for name, weight in weights.items()})
        weights["model.layers.1.mlp.up_proj.weight"][127, 63] = value

    change_weights(model_copy, change)
    fault = refusal(model_copy, tmp_path / "imported")
    assert "tensor 'model.layers.1.mlp.up_proj.weight' has values that are not finite numbers" in fault


def test_the_largest_finite_values_pass(model_copy: Path, tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights.update({name: weight.to(torch.bfloat16) for name, weight in weights.items()})
        weights["model.norm.weight"][:2] = torch.tensor([1.0, -1.0]) * torch.finfo(torch.bfloat16).max

    change_weights(model_copy, change)
    import_model(str(model_copy), str(tmp_path / "imported"))
    kept = load_file(tmp_path / "imported" / "model.safetensors")["model.norm.weight"]
    assert kept[:2].tolist() == [torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]


def test_what_is_not_finite_in_the_second_shard_leaves_nothing_of_the_first(
    sharded_model: Path, tmp_path: Path
) -> None:
    shard = sharded_model / "model-2.safetensors"
    weights = load_file(shard)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, shard, metadata={"format": "pt"})
    assert "model-2.safetensors: tensor 'model.norm.weight'" in refusal(sharded_model, tmp_path / "imported")


def test_shards_without_an_index_are_refused(sharded_model: Path, tmp_path: Path) -> None:
    (sharded_model / "model.safetensors.index.json").unlink()
    for number in (1, 2):
        (sharded_model / f"model-{number}.safetensors").rename(
            sharded_model / f"model-0000{number}-of-00002.safetensors"
        )
    fault = refusal(sharded_model, tmp_path / "imported")
    assert "shards of weights (model-00001-of-00002.safetensors) and no model.safetensors.index.json" in fault


@pytest.mark.parametrize("place", ["folder", "storage"])
@pytest.mark.parametrize("is_alone", [True, False])
def test_an_adapter_beside_or_instead_of_weights_is_refused(
    model_copy: Path, s3: str, tmp_path: Path, place: str, is_alone: bool
) -> None:
    (model_copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    if is_alone:
        (model_copy / "model.safetensors").rename(model_copy / "adapter_model.safetensors")
    source = str(model_copy)
    if place == "storage":
        source = f"{s3}/adapter-{is_alone}"
        for path in model_copy.iterdir():
            open_storage(source).upload(path, path.name)
    with pytest.raises(ModelError, match=r"adapter_config\.json is an adapter.*merge_and_unload"):
        import_model(source, str(tmp_path / "imported"))


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_a_quantised_model_is_refused_by_its_config(model_copy: Path, tmp_path: Path, where: str) -> None:
    marks = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    edit_json(model_copy / "config.json", **(marks if where == "top" else {"text_config": marks}))
    assert "config.json: its weights are quantised (gptq)" in refusal(model_copy, tmp_path / "imported")


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaModel"])
def test_an_architecture_that_writes_no_text_is_refused(model_copy: Path, tmp_path: Path, name: str) -> None:
    edit_json(model_copy / "config.json", architectures=[name])
    fault = refusal(model_copy, tmp_path / "imported")
    assert f"architectures names {name}, where a causal language model is needed (LlamaForCausalLM" in fault


def test_a_model_of_another_kind_is_refused(model_copy: Path, tmp_path: Path) -> None:
    edit_json(model_copy / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    fault = refusal(model_copy, tmp_path / "imported")
    assert "T5ForConditionalGeneration is no causal language model that transformers has" in fault


SMALL = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3Config(**SMALL, **HEADS, head_dim=16, tie_word_embeddings=True),
        transformers.Gemma3TextConfig(**SMALL, **HEADS, head_dim=16),
        transformers.MixtralConfig(**SMALL, **HEADS, num_local_experts=4),
        transformers.GPTNeoXConfig(**SMALL, **HEADS),
        transformers.OPTConfig(
            vocab_size=49152,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            word_embed_proj_dim=32,
            num_attention_heads=4,
        ),
        transformers.LlamaConfig(**SMALL, **HEADS, max_position_embeddings=512, rope_parameters=YARN),
    ],
    ids=lambda config: config.model_type,
)
def test_good_models_of_other_families_pass(tiny_model: Path, tmp_path: Path, config: PretrainedConfig) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "model")
    assert import_model(str(tmp_path / "model"), str(tmp_path / "imported")).stage == "import-model"


# Token ids.


def test_ids_of_a_tokenizer_that_have_no_row_are_refused(model_copy: Path, tmp_path: Path) -> None:
    more = AutoTokenizer.from_pretrained(model_copy)
    more.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    more.save_pretrained(model_copy)
    fault = refusal(model_copy, tmp_path / "imported")
    assert "ids up to 49153, its embedding 49152 rows: token '<|user|>' (id 49152) has none" in fault


def test_the_placeholder_of_a_picture_needs_no_row(model_copy: Path, tmp_path: Path) -> None:
    """As Gemma 3's text models have it."""
    more = AutoTokenizer.from_pretrained(model_copy)
    more.add_tokens(["<image_soft_token>"], special_tokens=True)
    more.save_pretrained(model_copy)
    edit_json(model_copy / "tokenizer_config.json", image_token="<image_soft_token>")
    import_model(str(model_copy), str(tmp_path / "imported"))
    assert load_tokenizer(tmp_path / "imported").get_vocab()["<image_soft_token>"] == 49152


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(model_copy: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    change_weights(model_copy, lambda weights: weights.update({name: weights[name][:30000].clone()}))
    edit_json(model_copy / "config.json", vocab_size=30000)
    assert "its embedding 30000 rows" in refusal(model_copy, tmp_path / "imported")


@pytest.mark.parametrize(("file", "ids"), [("config.json", 49152), ("generation_config.json", [2, 128009])])
def test_a_special_id_that_has_no_row_is_refused(model_copy: Path, tmp_path: Path, file: str, ids: object) -> None:
    edit_json(model_copy / file, eos_token_id=ids)
    wrong = ids if isinstance(ids, int) else 128009
    assert f"{file}: eos_token_id is {wrong}, the embedding has 49152 rows" in refusal(
        model_copy, tmp_path / "imported"
    )


# Tokenizer, template, generation config.


def test_a_tokenizer_of_a_newer_version_is_one_line(model_copy: Path, tmp_path: Path) -> None:
    values = json.loads((model_copy / "tokenizer.json").read_text())
    values["model"]["type"] = "BPE2"
    (model_copy / "tokenizer.json").write_text(json.dumps(values))
    assert "tokenizer.json: not a form that tokenizers" in refusal(model_copy, tmp_path / "imported")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_refused_as_one(model_copy: Path, tmp_path: Path, name: str) -> None:
    (model_copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    assert f"{name}: a Git LFS pointer, not the file itself" in refusal(model_copy, tmp_path / "imported")


def test_a_chat_template_that_is_no_jinja_is_refused(model_copy: Path, tmp_path: Path) -> None:
    (model_copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    assert "its chat template is no valid Jinja (line 1: " in refusal(model_copy, tmp_path / "imported")


def test_a_chat_template_that_fails_is_told_and_left_to_the_chat_format(
    model_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (model_copy / "chat_template.jinja").write_text("{{ raise_exception('only with tools') }}")
    import_model(str(model_copy), str(tmp_path / "imported"))
    assert "cannot be used: only with tools" in capfd.readouterr().err


BEAMS = {"eos_token_id": [2, 0], "pad_token_id": 2, "num_beams": 1, "early_stopping": True, "length_penalty": 0.5}


def test_a_generation_config_that_cannot_be_saved_is_cleaned_at_import(model_copy: Path, tmp_path: Path) -> None:
    (model_copy / "generation_config.json").write_text(json.dumps(BEAMS))
    import_model(str(model_copy), str(tmp_path / "imported"))

    stored = read_generation_config(tmp_path / "imported")
    assert stored["eos_token_id"] == [2, 0] and stored["pad_token_id"] == 2
    assert "early_stopping" not in stored and "length_penalty" not in stored


def test_a_generation_config_that_can_be_saved_is_stored_as_it_is(model_copy: Path, tmp_path: Path) -> None:
    before = (model_copy / "generation_config.json").read_bytes()
    import_model(str(model_copy), str(tmp_path / "imported"))
    assert (tmp_path / "imported" / "generation_config.json").read_bytes() == before


def test_saving_does_not_depend_on_the_generation_config(model_copy: Path, tmp_path: Path) -> None:
    """Of a model that an earlier version imported: its training ended, and nothing was saved."""
    (model_copy / "generation_config.json").write_text(json.dumps(BEAMS))
    save_model(load_model(model_copy, "float32"), load_tokenizer(model_copy), tmp_path / "saved", "float32")
    assert read_generation_config(tmp_path / "saved")["eos_token_id"] == [2, 0]


def test_superfluous_weights_are_refused_when_a_model_is_loaded_too(model_copy: Path, tmp_path: Path) -> None:
    """It may have been imported by an earlier version."""
    folder = Path(shutil.copytree(model_copy, tmp_path / "old"))
    change_weights(folder, lambda weights: weights.update({"score.weight": torch.zeros(1, 64)}))
    with pytest.raises(ModelError, match=r"no place .* 'score.weight'"):
        load_model(folder, "float32")


# Values of a config that no tensor's shape shows.


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"rms_norm_eps": "small"}, "its config cannot be loaded: Validation error for field 'rms_norm_eps': .*small"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
        ({"rope_theta": -1.0, "rope_parameters": None}, "frequencies that are no finite numbers: correct rope_theta"),
    ],
)
def test_a_config_that_no_model_runs_with_is_refused(
    model_copy: Path, tmp_path: Path, values: dict[str, object], fault: str
) -> None:
    edit_json(model_copy / "config.json", **values)
    assert re.search(fault, refusal(model_copy, tmp_path / "imported"))


def test_weights_of_nothing_but_zeros_are_told(
    model_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change_weights(model_copy, lambda w: w["model.layers.1.mlp.down_proj.weight"].zero_())
    import_model(str(model_copy), str(tmp_path / "imported"))
    told = capfd.readouterr().err
    assert "1 weights are nothing but zeros, such as 'model.layers.1.mlp.down_proj.weight'" in told

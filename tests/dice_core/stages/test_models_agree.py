"""Policy, reference and responses belong together and are numbers, or the stage ends before a model is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

from dice_core.data import records
from dice_core.models.files import ModelError
from dice_core.stages.evaluate import evaluate
from dice_core.stages.generate import generate
from dice_core.stages.import_model import import_model
from dice_core.stages.score import score
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, publish_files, require_manifest

pytestmark = pytest.mark.slow

SCORING = {"min_valid_responses": 2, "dtype": "float32", "min_characters": 1}


def with_other_ids(model: Path, folder: Path) -> Path:
    """Return a copy of a model whose tokenizer has each id one higher, modulo the size of the vocabulary."""
    shutil.copytree(model, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    vocab, special = values["model"]["vocab"], {token["content"] for token in values["added_tokens"]}
    words = [token for token in vocab if token not in special]
    ids = [vocab[word] for word in words]
    vocab.update(zip(words, ids[1:] + ids[:1], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the places of imported models by name."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_model, root / "same-raw")
    other = shutil.copytree(tiny_model, root / "template-raw")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    sources = {"policy": tiny_model, "same": root / "same-raw", "template": other}
    sources["shifted"] = with_other_ids(tiny_model, root / "shifted-raw")
    for name, source in sources.items():
        import_model(str(source), str(root / name))
    return {name: str(root / name) for name in sources}


def of_an_earlier_version(uri: str, place: Path) -> str:
    """Return the place of a copy whose manifest says nothing of its tokenizer."""
    shutil.copytree(uri, place)
    values = json.loads((place / "manifest.json").read_text())
    del values["text_digests"]
    (place / "manifest.json").write_text(json.dumps(values))
    return str(place)


def responses(place: Path, **inputs: str) -> str:
    tokens = {"prompt_token_ids": [10, 11], "response": "words", "finish_reason": "stop"}
    rows: list[dict[str, Any]] = [
        {"prompt_id": "a", "sample_index": index, "response_token_ids": [20 + index, 2], **tokens} for index in range(2)
    ]
    path = place.with_suffix(".parquet")
    records.write_table(pa.Table.from_pylist(rows, schema=records.RESPONSES), records.RESPONSES, path)
    manifest = Manifest(stage="generate", fingerprint="", files={}, inputs=inputs)
    publish_files(str(place), {"part-00000.parquet": path}, manifest)
    return str(place)


def test_an_import_says_what_turns_text_into_ids(models: dict[str, str]) -> None:
    digests = {name: require_manifest(uri).text_digests for name, uri in models.items()}
    assert digests["policy"] == digests["same"]
    assert digests["shifted"]["tokenizer"] != digests["policy"]["tokenizer"] == digests["template"]["tokenizer"]


@pytest.mark.parametrize("is_old", [False, True])
def test_a_reference_with_another_tokenizer_is_refused_by_score(
    models: dict[str, str], tmp_path: Path, is_old: bool
) -> None:
    reference = of_an_earlier_version(models["shifted"], tmp_path / "old") if is_old else models["shifted"]
    with pytest.raises(UnfitError, match=r"its tokenizer is not that of the policy .* \(token \d+ is ") as caught:
        score(models["policy"], reference, responses(tmp_path / "in"), str(tmp_path / "out"), scoring=SCORING)
    assert str(caught.value).startswith(reference) and "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["previous", "base_reference"])
def test_a_model_with_another_tokenizer_is_refused_by_evaluate(
    models: dict[str, str], tmp_path: Path, wrong: str
) -> None:
    publish_files(str(tmp_path / "data"), {}, Manifest(stage="prepare-data", fingerprint="", files={}))
    given = {"previous": models["template"], "base_reference": models["template"], wrong: models["shifted"]}
    with pytest.raises(UnfitError, match=f"its tokenizer is not that of the policy .*: give a {wrong.split('_')[0]}"):
        evaluate(
            models["policy"], given["previous"], given["base_reference"], str(tmp_path / "data"), str(tmp_path / "o")
        )


def test_responses_of_another_policy_are_refused_by_score(models: dict[str, str], tmp_path: Path) -> None:
    made_by = f"{models['template']}@{require_manifest(models['template']).content_digest}"
    with pytest.raises(UnfitError, match=r"was made with policy .*: give the policy that it was made with"):
        score(
            models["policy"],
            models["template"],
            responses(tmp_path / "in", policy=made_by),
            str(tmp_path / "out"),
            scoring=SCORING,
        )


def test_models_of_an_earlier_version_with_one_tokenizer_are_scored(models: dict[str, str], tmp_path: Path) -> None:
    old = of_an_earlier_version(models["template"], tmp_path / "old")
    made = score(models["policy"], old, responses(tmp_path / "in"), str(tmp_path / "out"), scoring=SCORING)
    assert made.metrics["num_scored"] == 2


def test_the_same_weights_and_other_templates_are_told(
    models: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = score(
        models["policy"], models["template"], responses(tmp_path / "in"), str(tmp_path / "out"), scoring=SCORING
    )
    assert made.metrics["reward_std"] == 0
    log = capfd.readouterr().err
    assert "policy and reference are the same weights, so every reward is 0" in log
    assert "policy and reference have different chat templates; prompts are those of the policy" in log


def test_generate_refuses_weights_that_are_not_finite_before_the_engine_starts(
    models: dict[str, str], tmp_path: Path
) -> None:
    """Of a model that an earlier version imported."""
    weights = load_file(Path(models["policy"]) / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = {name: Path(models["policy"]) / name for name in require_manifest(models["policy"]).files}
    files["model.safetensors"] = tmp_path / "model.safetensors"
    publish_files(str(tmp_path / "broken"), files, Manifest(stage="import-model", fingerprint="", files={}))
    prompts = pa.Table.from_pylist([{"prompt_id": "a", "prompt": "Hello?"}], schema=records.PROMPTS)
    records.write_table(prompts, records.PROMPTS, tmp_path / "prompts.parquet")
    with pytest.raises(ModelError, match=r"tensor 'model.norm.weight' has values that are not finite numbers"):
        generate(str(tmp_path / "broken"), str(tmp_path / "prompts.parquet"), str(tmp_path / "out"))

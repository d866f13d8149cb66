"""A model that an earlier version imported, which checked less, is checked when it is read and when it is asked for."""

from hashlib import sha256
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from dice_core.models.cache import fetch_model
from dice_core.models.files import ModelError
from dice_core.models.fitting import CHECKS
from dice_core.models.importing import import_model
from dice_core.models.sources import find_source
from dice_core.stages import import_model as stage
from dice_core.storage.manifest import Manifest, publish_files, read_manifest

pytestmark = pytest.mark.slow


def imported_before(folder: Path, place: str) -> Manifest:
    """Put a model into storage as version 0.1.0 did, whose manifests say nothing of checks."""
    fingerprint = sha256(f"import-model 1 {find_source(str(folder), '').identity} False".encode()).hexdigest()
    made = Manifest(stage="import-model", fingerprint=fingerprint, files={}, settings={"source": str(folder)})
    return publish_files(place, {path.name: path for path in folder.iterdir()}, made)


def test_a_good_one_is_checked_once_and_stays_what_it_was(
    model_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "models" / "old")
    before = imported_before(model_copy, place)
    assert (before.checks, before.text_digests) == (0, {})
    assert fetch_model(place, tmp_path / "cache") == Path(place)
    capfd.readouterr()

    checked = import_model(str(model_copy), place)

    assert "imported by an earlier version, which checked less: checked anew" in capfd.readouterr().err
    assert checked.content_digest == before.content_digest
    assert checked.checks == CHECKS and checked.text_digests.keys() == {"tokenizer", "chat_template"}
    assert read_manifest(place) == checked
    assert import_model(str(model_copy), place) == checked
    assert "checked anew" not in capfd.readouterr().err


def test_a_broken_one_is_refused_by_every_reader_with_its_address(model_copy: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "models" / "old")
    more = AutoTokenizer.from_pretrained(model_copy)
    more.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    more.save_pretrained(model_copy)
    imported_before(model_copy, place)

    reason = f"^{place}: imported by an earlier version, which checked less: .* token '<|user|>' .*has none"
    for read in (lambda: fetch_model(place, tmp_path / "cache"), lambda: import_model(str(model_copy), place)):
        with pytest.raises(ModelError, match=reason.replace("|", r"\|")) as caught:
            read()
        assert "\n" not in str(caught.value)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("model_class", "config_class", "more", "reason"),
    [
        (
            Llama4ForCausalLM,
            Llama4TextConfig,
            {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 16, "num_key_value_heads": 2},
            "llama4_text: transformers does not tell its decoder from its head; known to work are Llama",
        ),
        (OpenAIGPTLMHeadModel, OpenAIGPTConfig, {}, ""),
    ],
)
def test_what_cannot_give_log_probs_is_refused_at_import_as_far_as_its_structure_tells(
    model_class: type, config_class: type, more: dict[str, int], reason: str, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model_class(config_class(**SIZES, **more, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    if not reason:
        assert stage.import_model(str(tmp_path / "model"), str(tmp_path / "imported")).status == "completed"
        return
    with pytest.raises(ModelError, match=reason):
        stage.import_model(str(tmp_path / "model"), str(tmp_path / "imported"))

"""A sequence classification model is imported as a reward model, and is taken for nothing else; nor is a policy."""

import json
from pathlib import Path

import pytest

from dice_core.models.cache import fetch_model
from dice_core.models.files import ModelError
from dice_core.models.importing import import_model
from dice_core.stages.import_model import import_model as import_stage
from dice_core.stages.import_model import import_model_task
from dice_core.stages.run_settings import write_settings
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from tests.dice_core.judges.conftest import make_reward_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reward_model(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model("qwen3", smollm, tmp_path_factory.mktemp("reward"))


def test_a_reward_model_is_imported_where_one_is_asked_for_and_nowhere_else(
    reward_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    uri, policy = str(tmp_path / "judge"), str(tmp_path / "policy")
    manifest = import_model(str(reward_model), uri, kind="reward-model")
    assert manifest.settings["kind"] == "reward-model" and "model.safetensors" in manifest.files
    assert import_model(str(reward_model), uri, kind="reward-model") == manifest
    assert fetch_model(uri, tmp_path / "cache", kind="reward-model").is_dir()
    with pytest.raises(ModelError, match="holds a reward-model, where a language-model is needed"):
        fetch_model(uri, tmp_path / "cache")
    with pytest.raises(ModelError, match="holds a reward-model, where a language-model is needed"):
        import_model(str(reward_model), uri)
    import_model(str(tiny_model), policy)
    with pytest.raises(ModelError, match="holds a language-model, where a reward-model is needed"):
        fetch_model(policy, tmp_path / "cache", kind="reward-model")


def test_models_of_the_other_kind_are_refused_by_what_they_are(
    reward_model: Path, tiny_model: Path, smollm: Path, tmp_path: Path
) -> None:
    two_labels = make_reward_model("llama", smollm, tmp_path / "two", num_labels=2)
    without_template = make_reward_model("qwen3", smollm, tmp_path / "bare")
    (without_template / "chat_template.jinja").unlink()
    refused = [
        (
            reward_model,
            "language-model",
            "names Qwen3ForSequenceClassification, where a causal",
        ),
        (tiny_model, "reward-model", "names LlamaForCausalLM, where a reward model is needed"),
        (two_labels, "reward-model", "has 2 labels, and a reward model has one"),
        (without_template, "reward-model", "has no chat template, by which a reward model reads an answer"),
    ]
    for folder, kind, message in refused:
        with pytest.raises(ModelError, match=message) as caught:
            import_model(str(folder), str(tmp_path / "imported"), kind=kind)
        assert "\n" not in str(caught.value)
        assert open_storage(str(tmp_path / "imported")).list() == []
    with pytest.raises(ValueError, match="kind: must be language-model or reward-model, got 'judge'"):
        import_stage(str(tiny_model), str(tmp_path / "imported"), kind="judge")


def test_a_reward_model_without_its_head_is_refused(reward_model: Path, tmp_path: Path) -> None:
    """Else the head would be made up, and the judge with it."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(reward_model, tmp_path / "headless"))
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .* 'score.weight'"):
        import_model(str(folder), str(tmp_path / "imported"), kind="reward-model")


class FakeArtifact:
    """An output artifact as a body sees it."""

    def __init__(self) -> None:
        self.metadata: dict[str, object] = {}


def test_the_task_of_a_judge_imports_what_the_settings_name_and_nothing_that_they_do_not_use(
    reward_model: Path, tmp_path: Path
) -> None:
    root, source = str(tmp_path / "root"), str(reward_model)
    run_uri = layout.run(root, "r")

    def task(role: str, **sections: dict[str, str]) -> tuple[object, object]:
        shown = FakeArtifact()
        import_model_task(write_settings(run_uri, sections, {f"{role}_source": source}), role, shown)
        return shown.metadata["uri"], shown.metadata["status"]

    assert task("judge", judging={"judge": "none"}) == ("", "skipped")
    assert task("reward", scoring={}) == ("", "skipped")
    place = layout.imported_model(root, source)
    assert task("judge", judging={"judge": "reward-model"}) == (place, "completed")
    assert task("reward", scoring={"reward": "reward-model"}) == (place, "already complete")
    assert json.loads((Path(place) / "manifest.json").read_text())["settings"]["kind"] == "reward-model"
    with pytest.raises(ModelError, match="holds a reward-model, where a language-model is needed"):
        task("judge", judging={"judge": "chat-logprob"})

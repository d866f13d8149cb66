"""An import tries its output before it looks for the model, and says what a later training would refuse."""

from pathlib import Path
from typing import Any

import pytest

from dice_core.settings.base import ConfigError
from dice_core.stages.import_model import import_model, import_model_task
from dice_core.stages.run_settings import write_settings
from dice_core.storage import layout
from dice_core.storage.contract import NoAccessError
from pipelines.demo.object_store import ObjectStore
from tests.faulty_store import line_to


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    s3: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line_to(object_store, monkeypatch) as line:
        line.denied = b"PUT "
        with pytest.raises(NoAccessError, match="denies PutObject"):
            import_model("/no/model/here", f"{s3}/models/refused")


class Shown:
    """An output artifact as a task sees it."""

    def __init__(self) -> None:
        self.metadata: dict[str, object] = {}


@pytest.mark.slow
def test_a_policy_without_the_layers_that_adapters_are_for_ends_the_run_before_anything_is_generated(
    tiny_model: Path, tmp_path: Path
) -> None:
    root, source = str(tmp_path / "root"), str(tiny_model)

    def task(role: str, section: str, **training: Any) -> object:
        shown, plan = Shown(), {f"{role}_source": source}
        settings = write_settings(layout.run(root, "r"), {section: training}, plan)
        import_model_task(settings, role, shown)
        return shown.metadata["status"]

    assert task("reference", "training", lora_rank=4, lora_target_modules=["Wqkv"]) == "completed"
    for section in ("training", "warm_start_training"):
        with pytest.raises(ConfigError, match=f"{section}.lora_target_modules: llama has no linear layer 'Wqkv'"):
            task("policy", section, lora_rank=4, lora_target_modules=["Wqkv"])
    # k_proj is 64 x 32.
    with pytest.raises(ConfigError, match=r"training.lora_rank: must be at most 32, .* got 33: take 16, or 0"):
        task("policy", "training", lora_rank=33, lora_target_modules=["k_proj"])
    assert task("policy", "training", lora_rank=32, lora_target_modules=["k_proj"]) == "already complete"

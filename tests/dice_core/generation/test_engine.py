"""What vLLM is started with."""

import json
from pathlib import Path
from typing import Any

import pytest

from dice_core.generation.engine import GenerationError, started_engine
from dice_core.generation.settings import GenerationConfig

pytestmark = pytest.mark.slow


def test_the_size_of_tensor_parallelism_reaches_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vllm

    given: dict[str, Any] = {}

    def arguments(**settings: Any) -> None:
        given.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr(vllm, "EngineArgs", arguments)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = GenerationConfig(tensor_parallel_size=2)
    with pytest.raises(GenerationError, match="enough"), started_engine(tmp_path, config, 128):
        pass
    assert given["tensor_parallel_size"] == 2

"""What vLLM is started with."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dice_core.data.records import PROMPTS, prompt_id
from dice_core.data.settings import ChatConfig
from dice_core.generation.engine import GenerationError, started_engine
from dice_core.generation.responses import generate_parts
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


def test_two_processes_that_share_a_model_answer_as_one_does(
    served_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    texts = ("Name a fruit.", "What is 2 + 2?")
    prompts = pa.Table.from_pylist([{"prompt_id": prompt_id(text), "prompt": text} for text in texts], schema=PROMPTS)

    def responses(num_processes: int) -> list[list[int]]:
        config = GenerationConfig(
            num_responses=2, max_new_tokens=8, dtype="float32", tensor_parallel_size=num_processes
        )
        chat = ChatConfig(prompt_format="model", max_prompt_tokens=64)
        parts = generate_parts(served_model, prompts, config=config, chat=chat, seed=1, parts=[0])
        found: list[list[int]] = pa.concat_tables(part for _, part in parts)["response_token_ids"].to_pylist()
        return found

    assert responses(2) == responses(1)

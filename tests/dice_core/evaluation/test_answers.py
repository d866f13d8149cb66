"""What is asked, how answers are sampled, and a real engine that answers."""

import json
from pathlib import Path
from shutil import copytree

import pyarrow as pa
import pytest

from dice_core.data.records import PREFERENCES, PROMPTS, RESPONSES
from dice_core.data.settings import ChatConfig
from dice_core.evaluation.answers import answers_of, prompts_to_answer, sample_answers, sampling
from dice_core.evaluation.result import Answer
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import GenerationConfig


def test_the_first_distinct_prompts_are_asked() -> None:
    rows = [{"prompt_id": name, "prompt": f"{name}?", "chosen": "yes", "rejected": "no"} for name in "baabcd"]
    found = prompts_to_answer(pa.Table.from_pylist(rows, schema=PREFERENCES), 3)
    assert found.schema == PROMPTS and found.to_pylist() == [{"prompt_id": n, "prompt": f"{n}?"} for n in "bac"]


@pytest.mark.parametrize(("limit", "wanted"), [(0, 96), (64, 64)])
def test_answers_are_sampled_as_responses_are_one_to_a_prompt(limit: int, wanted: int) -> None:
    generation = GenerationConfig(num_responses=16, temperature=0.9, max_new_tokens=96, stop_token_ids=(7,))
    found = sampling(generation, EvaluationConfig(max_new_tokens=limit), 5)
    assert (found.num_responses, found.prompts_per_part, found.max_new_tokens) == (1, 5, wanted)
    assert (found.temperature, found.stop_token_ids) == (0.9, (7,))


def test_an_answer_is_a_response_with_its_reward() -> None:
    base = {"sample_index": 0, "prompt_token_ids": [1]}
    rows = [
        {**base, "prompt_id": "a", "response": "yes", "response_token_ids": [5, 2], "finish_reason": "stop"},
        {**base, "prompt_id": "b", "response": "and so", "response_token_ids": [5, 6, 7], "finish_reason": "length"},
    ]
    found = answers_of(pa.Table.from_pylist(rows, schema=RESPONSES), [0.5, None])
    assert found == [Answer("yes", False, 2, 0.5), Answer("and so", True, 3, None)]


def test_nothing_is_asked_of_nobody(tmp_path: Path) -> None:
    config = sampling(GenerationConfig(), EvaluationConfig(), 0)
    found = sample_answers(tmp_path / "no", PROMPTS.empty_table(), config, ChatConfig(), seed=0, role="policy")
    assert found.num_rows == 0 and found.schema == RESPONSES


@pytest.mark.slow
def test_answers_end_by_the_models_own_settings_in_the_order_of_the_prompts(served_model: Path, tmp_path: Path) -> None:
    """Every id ends an answer, by the model's own files: none is longer than that one id, and none is cut."""
    model = Path(copytree(served_model, tmp_path / "model"))
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(vocabulary))}))
    prompts = pa.table({"prompt_id": ["b", "a"], "prompt": ["Hello?", "A longer question?"]}, schema=PROMPTS)
    config = sampling(GenerationConfig(dtype="float32"), EvaluationConfig(max_new_tokens=4), 2)
    found = sample_answers(model, prompts, config, ChatConfig(max_prompt_tokens=64), seed=0, role="policy")
    assert found["prompt_id"].to_pylist() == ["b", "a"]
    assert [(answer.num_tokens, answer.is_cut) for answer in answers_of(found, [None, None])] == [(1, False)] * 2

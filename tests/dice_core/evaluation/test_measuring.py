"""Evaluation on a tiny model, and its arithmetic by hand."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from dice_core.data import records
from dice_core.data.chat import chat_format
from dice_core.data.records import PREFERENCES, RecordError
from dice_core.data.settings import ChatConfig
from dice_core.evaluation.answers import Answer, sample_answers
from dice_core.evaluation.measuring import Evaluation, Sample, evaluate_policy, summarise
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.models.files import TRUST_KEY, ModelError
from dice_core.models.loading import load_model, load_tokenizer
from dice_core.models.saving import save_model

pytestmark = pytest.mark.slow

CHAT = ChatConfig(max_prompt_tokens=64)
GENERATION = GenerationConfig(temperature=0.9)
EVALUATION = EvaluationConfig(
    dtype="float32", num_sample_prompts=3, max_new_tokens=8, tokens_per_batch=256, max_accuracy_drop=0.3
)


def preferences(*rows: tuple[str, str, str]) -> pa.Table:
    values = [
        {"prompt_id": records.prompt_id(prompt), "prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in rows
    ]
    return pa.Table.from_pylist(values, schema=PREFERENCES)


HELD_OUT = preferences(
    ("Name a fruit.", "An apple is a fruit.", "No."),
    ("What is 2 + 2?", "It is 4.", "It is 5, or perhaps 6."),
    ("Say hello.", "Hello there!", "Bye."),
    ("Why is the sky blue?", "Air scatters blue light most.", "It is not."),
)


@pytest.fixture(scope="module")
def changed_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its weights moved a little."""
    model, folder = load_model(tiny_model, "float32"), tmp_path_factory.mktemp("changed")
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_model(model, load_tokenizer(tiny_model), folder, "float32")
    return folder


def evaluate(policy: Path, previous: Path, base: Path) -> Evaluation:
    return evaluate_policy(
        policy, previous, base, HELD_OUT, evaluation=EVALUATION, chat=CHAT, generation=GENERATION, seed=3
    )


def test_a_policy_that_is_its_base_has_reward_0_everywhere_and_says_that_all_pairs_tie(
    tiny_model: Path, device: str
) -> None:
    metrics = evaluate(tiny_model, tiny_model, tiny_model).metrics()
    assert metrics["heldout_reward_margin"] == metrics["heldout_chosen_reward"] == 0
    assert metrics["heldout_reward_accuracy"] == 0.5
    assert metrics["num_heldout_ties"] == metrics["num_held_out_pairs"] == 4
    assert metrics["response_characters_growth"] == 0
    assert (metrics["accepted"], metrics["improved"]) == (1, 0)


def test_the_same_weights_in_two_folders_give_the_same_answers(tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    result = evaluate(copy, tiny_model, tiny_model)
    assert [sample.policy for sample in result.samples] == [sample.previous for sample in result.samples]


def test_answers_are_as_long_as_those_of_generation_where_no_other_limit_is_given(tiny_model: Path) -> None:
    def answers(evaluation: EvaluationConfig, generation: GenerationConfig) -> list[Sample]:
        options = {"evaluation": evaluation, "generation": generation, "chat": CHAT, "seed": 3}
        return evaluate_policy(tiny_model, tiny_model, tiny_model, HELD_OUT, **options).samples

    unlimited = EVALUATION.model_copy(update={"max_new_tokens": 0})
    short = GENERATION.model_copy(update={"max_new_tokens": 8})
    assert answers(unlimited, short) == answers(EVALUATION, GENERATION)


def test_rewards_of_both_policies_are_taken_against_the_base(tiny_model: Path, changed_model: Path) -> None:
    metrics = evaluate(changed_model, tiny_model, tiny_model).metrics()
    assert metrics["heldout_reward_margin_previous"] == 0
    assert metrics["heldout_reward_margin"] == pytest.approx(metrics["heldout_step_margin"])
    backwards = evaluate(tiny_model, changed_model, tiny_model).metrics()
    assert backwards["heldout_reward_margin_previous"] == pytest.approx(metrics["heldout_reward_margin"], abs=1e-6)


@pytest.fixture
def broken_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a weight that is not a number, as if it had been published so."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_policy_that_gives_no_numbers_is_refused_by_the_gate_before_it_is_sampled(
    tiny_model: Path, broken_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(broken_model, tiny_model, tiny_model)
    assert result.gate.reasons == ("log-probs of 4 held-out pairs are not finite numbers",)
    assert not result.accepted and not result.promotable and result.samples == []
    assert result.gate.warnings[-1] == "no answers were sampled: the growth in length is unknown"
    assert "answers to" not in capfd.readouterr().err
    assert result.metrics()["num_non_finite_pairs"] == 4
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("role", ["previous", "base reference"])
def test_another_model_that_gives_no_numbers_ends_the_evaluation_in_one_line(
    tiny_model: Path, broken_model: Path, role: str
) -> None:
    models = {"previous": tiny_model, "base reference": tiny_model, role: broken_model}
    with pytest.raises(ModelError, match=rf"log-probs of 4 of 4 held-out pairs under the {role} .* are not finite"):
        evaluate(tiny_model, models["previous"], models["base reference"])


def test_a_model_that_cannot_be_sampled_from_is_one_line(broken_model: Path) -> None:
    template = chat_format(load_tokenizer(broken_model), CHAT)
    options = {"generation": GENERATION, "stop_ids": (2,), "max_new_tokens": 4, "seed": 3}
    with pytest.raises(ModelError, match="probabilities of the next token are not finite"):
        sample_answers(load_model(broken_model, "float32"), template, ["Hello?"], **options)


def test_a_result_is_plain_json_with_the_samples_of_both(tiny_model: Path, changed_model: Path) -> None:
    result = json.loads(json.dumps(evaluate(changed_model, tiny_model, tiny_model).to_dict(), allow_nan=False))
    assert [sample["prompt"] for sample in result["samples"]] == HELD_OUT["prompt"].to_pylist()[:3]
    assert set(result["samples"][0]["policy"]) == {"text", "is_cut"}
    assert result["gate"]["accepted"] is True


def test_a_policy_whose_config_is_code_of_its_own_is_read_when_that_was_allowed(
    model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
    (model_copy / "own.py").write_text(code)
    config = json.loads((model_copy / "config.json").read_text())
    config |= {"model_type": "own-llama", "auto_map": {"AutoConfig": "own.OwnConfig"}, TRUST_KEY: True}
    config["max_position_embeddings"] = 8  # ends the evaluation after the config is read, before weights are
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecordError, match="none fits the model's context of 8 tokens"):
        evaluate(model_copy, model_copy, model_copy)


def test_pairs_beyond_the_models_context_are_left_out_and_counted(tiny_model: Path) -> None:
    long = "word " * 3000
    table = pa.concat_tables([HELD_OUT, preferences(("Go on.", long, "No."))])
    chat, generation = CHAT, GENERATION
    result = evaluate_policy(
        tiny_model, tiny_model, tiny_model, table, evaluation=EVALUATION, chat=chat, generation=generation, seed=0
    )
    assert (result.counts["num_held_out_pairs"], result.counts["num_too_long_pairs"]) == (4, 1)
    with pytest.raises(RecordError, match="none fits the model's context of 2048 tokens"):
        evaluate_policy(
            tiny_model,
            tiny_model,
            tiny_model,
            table.slice(4),
            evaluation=EVALUATION,
            chat=chat,
            generation=generation,
            seed=0,
        )


def test_answers_do_not_depend_on_the_models_own_sampling_settings(tiny_model: Path) -> None:
    model = load_model(tiny_model, "float32")
    template = chat_format(load_tokenizer(tiny_model), CHAT)

    def answers() -> list[Answer]:
        return sample_answers(
            model,
            template,
            ["Hi.", "A longer prompt."],
            generation=GENERATION,
            stop_ids=template.stop_token_ids,
            max_new_tokens=8,
            seed=1,
        )

    plain = answers()
    model.generation_config.top_k, model.generation_config.temperature = 1, 0.01
    assert answers() == plain
    assert model.generation_config.top_k == 1


def test_a_stop_id_ends_an_answer_and_the_limit_cuts_one(tiny_model: Path) -> None:
    model = load_model(tiny_model, "float32")
    template = chat_format(load_tokenizer(tiny_model), CHAT)

    def answer(stop_ids: tuple[int, ...], max_new_tokens: int) -> Answer:
        [answer] = sample_answers(
            model,
            template,
            ["Hi."],
            generation=GENERATION,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            seed=1,
        )
        return answer

    assert answer(tuple(range(model.config.vocab_size)), 8) == Answer("", False)
    assert answer(template.stop_token_ids, 1).is_cut


@pytest.mark.parametrize("owner", ["settings", "model"])
def test_answers_end_where_responses_to_train_on_do(tiny_model: Path, tmp_path: Path, owner: str) -> None:
    """Every id ends an answer, by the settings or by the model's own files: all answers are empty."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    every = list(range(load_model(tiny_model, "float32").config.vocab_size))
    generation = GENERATION
    if owner == "settings":
        generation = GENERATION.model_copy(update={"stop_token_ids": tuple(every)})
    else:
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": every}))
    result = evaluate_policy(
        model, model, model, HELD_OUT, evaluation=EVALUATION, chat=CHAT, generation=generation, seed=0
    )
    assert {sample.policy for sample in result.samples} == {Answer("", False)}


def sample(previous: str, policy: str) -> Sample:
    return Sample("?", Answer(previous, False), Answer(policy, False))


SAMPLES = [sample("a" * 10, "b" * 12), sample("c" * 20, "d" * 18)]
BASE = np.zeros((4, 2))


def test_accuracies_margins_and_their_change_by_hand() -> None:
    policy = np.array([[-1.0, -2.0], [-3.0, -1.0], [-1.0, -4.0], [-2.0, -2.5]])  # margins 1, -2, 3, 0.5
    previous = np.array([[-1.0, -2.0], [-3.0, -1.0], [-4.0, -1.0], [-2.0, -2.0]])  # margins 1, -2, -3, 0
    metrics = summarise(policy, previous, BASE, SAMPLES, EVALUATION).metrics()
    assert metrics["heldout_reward_accuracy"] == 0.75
    assert metrics["heldout_reward_accuracy_previous"] == pytest.approx(0.375)
    assert metrics["heldout_reward_accuracy_change"] == pytest.approx(0.375)
    assert metrics["heldout_reward_margin"] == pytest.approx(0.625)
    assert metrics["heldout_step_margin"] == pytest.approx((0 + 0 + 6 + 0.5) / 4)
    assert metrics["num_heldout_ties_previous"] == 1
    assert metrics["mean_response_characters"] == metrics["mean_response_characters_previous"] == 15
    assert (metrics["accepted"], metrics["improved"]) == (1, 1)


def test_a_policy_that_is_worse_within_the_bound_is_accepted_and_not_promotable() -> None:
    better = np.tile([-1.0, -2.0], (4, 1))
    worse = np.array([[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], [-2.0, -1.0]])
    result = summarise(worse, better, BASE, SAMPLES, EVALUATION)
    assert result.accepted and not result.promotable and result.metrics()["improved"] == 0
    # errors of 4 pairs, two added: sqrt(1 + 1 - 1 / 6) / 6
    assert result.gate.reason == "no gain: accuracy 100.0% -> 75.0% (-25.0 +/- 22.6 points)"
    assert summarise(better, worse, BASE, SAMPLES, EVALUATION).promotable


def test_a_policy_with_log_probs_that_are_no_numbers_is_refused() -> None:
    policy = np.array([[math.nan, -1.0], [-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]])
    result = summarise(policy, BASE, BASE, SAMPLES, EVALUATION)
    assert not result.accepted and "1 held-out pairs are not finite" in result.gate.reason
    assert result.counts["num_held_out_pairs"] == 3


def test_numbers_that_could_not_be_measured_are_left_out_of_the_metrics() -> None:
    nothing = np.full((4, 2), math.nan)
    empty = [replace(one, previous=Answer("", False)) for one in SAMPLES]
    metrics = summarise(BASE, nothing, BASE, empty, EVALUATION).metrics()
    assert "heldout_reward_accuracy" not in metrics and "response_characters_growth" not in metrics
    assert all(isinstance(value, str) or math.isfinite(value) for value in metrics.values())

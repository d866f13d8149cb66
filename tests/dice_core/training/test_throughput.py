"""Speed of training: what is counted, worked by hand."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments

from dice_core.training.batches import TrainingPair
from dice_core.training.throughput import Speedometer, num_operations

pytestmark = pytest.mark.slow


def model(tie: bool) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=10,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tie,
        )
    )


@pytest.mark.parametrize("tie", [False, True])
def test_every_token_meets_the_layers_and_a_responses_the_head_too(tie: bool) -> None:
    # Queries and outputs 64 each, keys and values 32 each, the MLP 3 x 128, three norms of 8: 600. The head has 80.
    assert num_operations(model(tie), num_tokens=10, num_response_tokens=4) == 2 * (600 * 10 + 80 * 4)


def pair(num_prompt_tokens: int, num_response_tokens: int) -> TrainingPair:
    prompt, chosen = np.zeros(num_prompt_tokens, np.int32), np.zeros(num_response_tokens - 1, np.int32)
    return TrainingPair(0, "a", prompt, chosen, np.zeros(1, np.int32))


def test_lines_count_what_came_since_the_last_and_the_totals_count_all() -> None:
    arguments, state, control = TrainingArguments(report_to=[]), TrainerState(), TrainerControl()
    # Steps from 0 to 2, from 10 to 11 and from 20 to 22 seconds: what lies between is no training.
    clock: Iterator[float] = iter([0.0, 2.0, 10.0, 11.0, 20.0, 22.0])
    speed, policy = Speedometer(lambda: next(clock)), model(tie=True)

    def step(*pairs: TrainingPair) -> None:
        speed.on_step_begin(arguments, state, control)
        speed.count(pairs)
        speed.on_step_end()

    step(pair(5, 15), pair(2, 8))
    assert speed.since_last_line(policy)["tokens_per_second"] == 30 / 2
    step(pair(10, 20))
    step(pair(5, 10))
    line = speed.since_last_line(policy)
    assert line["tokens_per_second"] == 45 / 3
    assert line["peak_memory_bytes"] > 1e6
    totals = speed.totals(policy)
    assert (totals["tokens_per_second"], totals["seconds_per_step"]) == (75 / 5, round(5 / 3, 3))
    assert totals["num_processes"] == 1


def test_a_line_of_a_resumed_training_counts_its_time_from_where_it_resumed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 80 of 100 steps were made before; two more took 50 seconds, with what lay between them.
    clock = iter([0.0, 20.0, 30.0, 50.0, 50.0])
    speed = Speedometer(lambda: next(clock))
    arguments, control = TrainingArguments(report_to=[]), TrainerControl()
    state = TrainerState(global_step=80, max_steps=100)
    for step in (81, 82):
        speed.on_step_begin(arguments, state, control)
        speed.on_step_end()
        state.global_step = step
    values = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.25}
    speed.on_log(arguments, state, control, values)
    assert capsys.readouterr().err[9:] == (
        "train: step 82 of 100 (eval pairs): loss 0.5000, reward accuracy 0.75, margin 0.2500, 2.4/min, 8 min left\n"
    )

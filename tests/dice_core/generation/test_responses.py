"""Parts, shards and seeds; and real vLLM on a real small model: ids in and out, resumed without a change of text."""

import json
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.data.chat import PromptTooLongError, chat_format
from dice_core.data.records import PROMPTS, RESPONSES, RecordError, prompt_id
from dice_core.data.settings import ChatConfig
from dice_core.generation.responses import (
    generate_parts,
    num_duplicate_responses,
    num_parts,
    request_order,
    request_seed,
    shard_rows,
    stop_token_ids,
)
from dice_core.generation.settings import GenerationConfig
from dice_core.settings.base import ConfigError

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is 2+2?",
    "Say hello in Spanish.",
    "Name three fruits.",
    "Is the sky blue? Answer yes or no.",
    "What is the capital of France?",
    "Write the word 'cat' and nothing else.",
]
STORIES = ["Write a long story about a dog.", "Tell me all about the history of Rome."]
# float32: what else is in the batch must not decide a token. 8 sequences at a time: 24 wait for each other.
CONFIG = GenerationConfig(
    num_responses=4,
    max_new_tokens=24,
    dtype="float32",
    prompts_per_part=2,
    max_concurrent_sequences=8,
)
CHAT = ChatConfig(max_prompt_tokens=128)


def prompts_of(texts):
    return pa.table({"prompt_id": [prompt_id(text) for text in texts], "prompt": texts}, schema=PROMPTS)


def generate(model, *, prompts=None, config=CONFIG, chat=CHAT, seed=7, parts=(0, 1, 2), on_progress=None):
    table = prompts_of(QUESTIONS) if prompts is None else prompts
    return generate_parts(model, table, config=config, chat=chat, seed=seed, parts=parts, on_progress=on_progress)


# -- parts, shards, seeds --------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shards_cover_every_row_once_and_are_balanced(num_prompts, num_shards):
    shards = [shard_rows(num_prompts, shard, num_shards) for shard in range(num_shards)]
    assert [row for rows in shards for row in rows] == list(range(num_prompts))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_shard_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="shard must be from 0 to 3, got 4"):
        shard_rows(10, 4, 4)


@pytest.mark.parametrize(("num_prompts", "count"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_the_last_part_may_be_short(num_prompts, count):
    assert num_parts(num_prompts, CONFIG) == count


@given(st.integers(2, 64), st.integers(0, 2**31 - 1), st.lists(st.text(), min_size=2, max_size=20, unique=True))
def test_the_samples_of_two_prompts_share_all_seeds_or_none(num_responses, seed, ids):
    seeds = [request_seed(seed, i, num_responses) for i in ids]
    assert all(s % num_responses == 0 and s >= 0 and s + num_responses <= 2**32 for s in seeds)


def test_duplicates_are_counted_within_a_prompt():
    """a: x, x, x is two repeats; b: x is none; b: y, y is one."""
    table = pa.table({"prompt_id": list("aaabbb"), "response": list("xxxxyy")})
    assert num_duplicate_responses(table) == 3


# -- what is wrong is said before the engine starts ------------------------------------------------------------------


def test_settings_beyond_the_models_context_are_an_error(tiny_model):
    chat = ChatConfig(max_prompt_tokens=2040)
    with pytest.raises(ConfigError, match=r"2040 and 24 new tokens need a context of 2064 tokens, .* has one of 2048"):
        next(generate(tiny_model, chat=chat))


def test_a_long_prompt_is_an_error_that_names_it(tiny_model):
    prompts = prompts_of(["Hi", "word " * 200])
    with pytest.raises(PromptTooLongError, match=rf"prompt {prompt_id('word ' * 200)} has \d+ tokens"):
        next(generate(tiny_model, prompts=prompts, parts=[0]))


def test_a_prompt_id_that_is_there_twice_is_an_error(tiny_model):
    with pytest.raises(RecordError, match=f"prompt_id '{prompt_id('Hi')}' is there more than once"):
        next(generate(tiny_model, prompts=prompts_of(["Hi", "Hi"]), parts=[0]))


def test_a_part_that_is_not_there_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="parts must be from 0 to 2 for 6 prompts, got 3"):
        next(generate(tiny_model, parts=[1, 3]))


def test_nothing_wanted_starts_nothing(tmp_path):
    assert list(generate(tmp_path / "no-model", parts=[])) == []


# -- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(smollm):
    """Return the parts of one whole run, and the calls of its progress."""
    calls = []
    parts = dict(generate(smollm, on_progress=lambda *counts: calls.append(counts)))
    return parts, calls


@pytest.fixture(scope="module")
def rows(run):
    parts, _ = run
    return pa.concat_tables([parts[i] for i in sorted(parts)]).to_pylist()


@pytest.fixture(scope="module")
def template(smollm):
    from dice_core.models.loading import load_tokenizer

    return chat_format(load_tokenizer(smollm), CHAT)


def test_each_part_has_its_prompts_in_order_with_all_their_samples(run):
    parts, _ = run
    assert sorted(parts) == [0, 1, 2]
    for index, table in parts.items():
        expected = [prompt_id(text) for text in QUESTIONS[2 * index : 2 * index + 2] for _ in range(4)]
        assert table.schema == RESPONSES
        assert table["prompt_id"].to_pylist() == expected
        assert table["sample_index"].to_pylist() == [0, 1, 2, 3] * 2


def test_prompt_ids_are_those_of_the_chat_format(rows, template):
    texts = {prompt_id(text): text for text in QUESTIONS}
    assert all(row["prompt_token_ids"] == template.prompt_token_ids(texts[row["prompt_id"]]) for row in rows)


def test_the_text_is_that_of_the_ids(rows, template):
    assert all(row["response"] == template.decode_response(row["response_token_ids"]) for row in rows)


def test_a_stopped_response_ends_with_its_end_of_turn_and_a_cut_one_has_none(rows, template):
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        ends = [i for i, token in enumerate(row["response_token_ids"]) if token == template.end_of_turn_id]
        last = len(row["response_token_ids"]) - 1
        assert ends == ([last] if row["finish_reason"] == "stop" else [])
        assert (last + 1 == CONFIG.max_new_tokens) or row["finish_reason"] == "stop"


def test_an_offline_answer_of_the_same_text_has_the_same_ids(rows, template):
    """Nearly always: a model may also spell a word with other tokens than the tokenizer does."""
    stopped = [row for row in rows if row["finish_reason"] == "stop"]
    same = [template.response_token_ids(row["response"]) == row["response_token_ids"] for row in stopped]
    assert sum(same) > 0.7 * len(same)


def test_prompts_that_begin_alike_are_asked_one_after_another():
    assert request_order({0: [5, 1, 9], 1: [7, 2], 2: [5, 1, 3], 3: [7]}) == [2, 0, 3, 1]


def test_a_response_ends_at_the_end_of_turn_or_at_an_eos_of_the_model_or_at_an_id_of_the_settings(tiny_model, tmp_path):
    """The tiny model's files name one EOS id, the tokenizer's; the copy's name two more, as Qwen's do."""
    from dice_core.models.loading import load_tokenizer

    template = chat_format(load_tokenizer(tiny_model), CHAT)
    end = template.end_of_turn_id
    assert stop_token_ids(tiny_model, template, CONFIG) == (end,)
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    config = CONFIG.model_copy(update={"stop_token_ids": (7, 5)})
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, end, 6]}))
    assert stop_token_ids(copy, template, config) == (end, 5, 6, 7)
    (copy / "generation_config.json").unlink()
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, "eos_token_id": 8}))
    assert stop_token_ids(copy, template, config) == (end, 8, 7, 5)
    for unknown in (-1, len(template.tokenizer)):
        with pytest.raises(ConfigError, match=rf"^generation.stop_token_ids: .* ids from 0 to .*, got {unknown}: name"):
            stop_token_ids(tiny_model, template, CONFIG.model_copy(update={"stop_token_ids": (5, unknown)}))


def test_samples_of_a_prompt_differ(run):
    parts, _ = run
    assert sum(num_duplicate_responses(table) for table in parts.values()) < 8


def test_progress_counts_up_to_all_prompts_and_tokens(run):
    parts, calls = run
    num_tokens = sum(pc.sum(pc.list_value_length(table["response_token_ids"])).as_py() for table in parts.values())
    assert calls[-1] == (6, 6, num_tokens)
    assert calls == sorted(calls)


@pytest.mark.gpu("vllm")
def test_on_a_gpu_every_prompt_is_answered_in_order_by_the_ids_of_its_text(run, rows, template):
    from vllm.platforms import current_platform

    assert current_platform.is_cuda()
    assert sorted(run[0]) == [0, 1, 2]
    assert [row["prompt_id"] for row in rows] == [prompt_id(text) for text in QUESTIONS for _ in range(4)]
    assert all(row["response"] == template.decode_response(row["response_token_ids"]) for row in rows)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


def test_a_resumed_task_draws_the_same_responses(run, smollm, tmp_path):
    """The remaining parts alone, in a fresh process: the very same rows, though other prompts share the batch."""
    prompts = tmp_path / "prompts.parquet"
    pq.write_table(prompts_of(QUESTIONS), prompts)
    script = (
        "import sys; from pathlib import Path; import pyarrow.parquet as pq\n"
        "from dice_core.data.settings import ChatConfig\nfrom dice_core.generation.settings import GenerationConfig\n"
        "from dice_core.generation.responses import generate_parts\n"
        "model, folder, config, chat = sys.argv[1:]\n"
        "for i, table in generate_parts(Path(model), pq.read_table(folder + '/prompts.parquet'),\n"
        "        config=GenerationConfig.model_validate_json(config), chat=ChatConfig.model_validate_json(chat),\n"
        "        seed=7, parts=[1, 2]):\n"
        "    pq.write_table(table, f'{folder}/part-{i}.parquet')\n"
    )
    arguments = [str(smollm), str(tmp_path), CONFIG.model_dump_json(), CHAT.model_dump_json()]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    parts, _ = run
    assert [pq.read_table(tmp_path / f"part-{i}.parquet").equals(parts[i]) for i in (1, 2)] == [True, True]
    assert not (tmp_path / "part-0.parquet").exists()


def test_another_iteration_draws_other_responses_and_closing_early_stops_the_engine(run, smollm):
    import torch

    set_num_threads = torch.set_num_threads
    parts = generate(smollm, seed=8)
    index, table = next(parts)
    parts.close()
    assert not table["response_token_ids"].equals(run[0][index]["response_token_ids"])
    assert not torch.distributed.is_initialized()
    assert torch.set_num_threads is set_num_threads


@pytest.mark.parametrize("ends_at_a_full_stop", [True, False])
def test_the_ids_of_the_models_own_generation_settings_end_a_response(smollm, tmp_path, ends_at_a_full_stop):
    from dice_core.models.loading import load_tokenizer

    for path in smollm.iterdir():
        if path.name != "generation_config.json":
            (tmp_path / path.name).symlink_to(path)
    tokenizer = load_tokenizer(smollm)
    stops = [tokenizer.eos_token_id, *(tokenizer.encode(".") if ends_at_a_full_stop else [])]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    # Nearly greedy: the stories are longer than the limit.
    config = CONFIG.model_copy(update={"temperature": 0.01, "max_new_tokens": 64})
    [(_, responses)] = generate_parts(tmp_path, prompts_of(STORIES), config=config, chat=CHAT, seed=1, parts=[0])
    assert set(responses["finish_reason"].to_pylist()) == {"stop" if ends_at_a_full_stop else "length"}

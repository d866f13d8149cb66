"""Responses of somebody else: token ids and texts belong together, or the table is refused."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dice_core.data.chat import ChatFormat, chat_format
from dice_core.data.records import PAIRS, PROMPTS, RESPONSES, SCORES, RecordError, prompt_id
from dice_core.data.settings import ChatConfig
from dice_core.data.sources import RESPONSE_TEXT
from dice_core.preferences.own_responses import ResponseTables, check_pairs, checked, checked_scores, require_some
from dice_core.preferences.selection import PairError

QUESTION = "Who is Zo\u00eb?"


@pytest.fixture(scope="module")
def template(smollm: Path) -> ChatFormat:
    return chat_format(AutoTokenizer.from_pretrained(smollm), ChatConfig(max_prompt_tokens=64))


@pytest.fixture(scope="module")
def small_letters() -> ChatFormat:
    """Return the format of a tokenizer that has words in small letters, and one id for all that it does not know."""
    words = {word: i for i, word in enumerate(["<unk>", "<end>", "yes", "no", "who", "are", "you"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        chat_template="{% for m in messages %}{{ m.content }} {% endfor %}",
    )
    return chat_format(fast, ChatConfig())


def texts(*rows: tuple[str, str]) -> pa.Table:
    return pa.Table.from_pylist([{"prompt": prompt, "response": response} for prompt, response in rows], RESPONSE_TEXT)


def prompts(*questions: str) -> pa.Table:
    return pa.Table.from_pylist([{"prompt_id": prompt_id(text), "prompt": text} for text in questions], PROMPTS)


def row(template: ChatFormat, **changed: Any) -> pa.Table:
    """Return a table of one response to QUESTION, with something changed."""
    made = {
        "prompt_id": prompt_id(QUESTION),
        "sample_index": 3,
        "prompt_token_ids": template.prompt_token_ids(QUESTION),
        "response_token_ids": template.response_token_ids("She is Zo\u00eb."),
        "response": "She is Zo\u00eb.",
        "finish_reason": "stop",
    }
    return pa.Table.from_pylist([made | changed], schema=RESPONSES)


def check(table: pa.Table, template: ChatFormat) -> list[pa.Table]:
    return list(checked([table], prompts(QUESTION), template, "r.parquet"))


def test_texts_become_the_rows_that_generate_would_have_written(template: ChatFormat) -> None:
    made = ResponseTables(texts((QUESTION, "A girl.\n"), ("Hi", "Hello."), (QUESTION, "I do not know.")), template)
    [table] = made.tables()
    assert table.schema == RESPONSES
    assert [(r["prompt_id"], r["sample_index"], r["response"]) for r in table.to_pylist()] == [
        (prompt_id(QUESTION), 0, "A girl."),
        (prompt_id(QUESTION), 1, "I do not know."),
        (prompt_id("Hi"), 0, "Hello."),
    ]
    assert table["response_token_ids"][0].as_py() == template.response_token_ids("A girl.")
    assert table["prompt_token_ids"][0].as_py() == template.prompt_token_ids(QUESTION)
    assert (made.counts["num_prompts"], made.counts["num_responses"]) == (2, 3)
    assert list(checked([table], prompts(QUESTION, "Hi"), template)) == [table]


def test_what_is_left_out_has_a_reason_and_nothing_left_says_which(template: ChatFormat) -> None:
    rows = texts((QUESTION, "a"), (QUESTION, "b<|im_end|>"), ("Hi", "c"), ("Go on " * 60, "d"), ("[INST] x", "e"))
    known = {prompt_id(prompt) for prompt in rows["prompt"].to_pylist() if prompt != "Hi"}
    made = ResponseTables(rows, template, known, re.compile(r"<\|im_end\|>|\[INST\]"))
    assert sum(table.num_rows for table in made.tables()) == 1
    dropped = {"num_dropped_control_tokens": 2, "num_dropped_not_in_data": 1, "num_dropped_prompt_too_long": 1}
    assert made.counts == {"num_prompts": 1, "num_responses": 1, **dropped}
    nothing = ResponseTables(rows, template, set())
    assert list(nothing.tables()) == []
    with pytest.raises(RecordError, match=r"^own.jsonl: no response is left, dropped: 5 not_in_data$"):
        require_some(nothing.counts, "own.jsonl")


def test_a_prompt_is_in_one_table_however_many_there_are(template: ChatFormat) -> None:
    made = ResponseTables(texts(*[(f"Question {i % 3000}?", "Yes.") for i in range(6000)]), template)
    tables = list(made.tables())
    assert [table.num_rows for table in tables] == [4096, 1904]
    assert not set(tables[0]["prompt_id"].to_pylist()) & set(tables[1]["prompt_id"].to_pylist())


def test_ids_of_another_text_are_refused_with_both(template: ChatFormat) -> None:
    other = template.response_token_ids("It rains.")
    with pytest.raises(PairError) as caught:
        check(row(template, response_token_ids=other), template)
    assert str(caught.value).startswith(
        f"r.parquet: prompt_id {prompt_id(QUESTION)}, sample_index 3: response_token_ids are 'It rains.' in the "
        "policy's tokenizer, and the text is 'She is Zo\u00eb.'"
    )
    with pytest.raises(
        PairError, match=r"prompt_token_ids are 'system.*' in the policy's tokenizer, and the text is 'Who"
    ):
        check(row(template, prompt_token_ids=template.prompt_token_ids("Why?")), template)
    with pytest.raises(PairError, match="response_token_ids are '<no such token>'"):
        check(row(template, response_token_ids=[10**6]), template)


def test_what_a_tokenizer_or_an_engine_cannot_give_back_is_no_difference(
    template: ChatFormat, small_letters: ChatFormat
) -> None:
    # Cut in the middle of a character: of its bytes the first is there, and the engine leaves it out of the text.
    whole = template.response_token_ids("She is \U0001f600")[:-1]
    cut = next(whole[:n] for n in range(len(whole), 0, -1) if template.decode_response(whole[:n]).endswith("\ufffd"))
    assert check(row(template, response_token_ids=cut, response="She is", finish_reason="length"), template)
    # Another chat format than ours, without the end of turn: the prompt is in it.
    asked = template.tokenizer.encode(f"USER: {QUESTION}\nASSISTANT:")
    assert check(row(template, prompt_token_ids=asked), template)
    for text in ("YES no", "Yes \u65e5\u672c"):
        ids = small_letters.response_token_ids(text)
        assert small_letters.decode_response(ids) != text
        own = row(template, prompt_token_ids=[4, 5, 6], response_token_ids=ids, response=text)
        who = own.set_column(0, RESPONSES.field("prompt_id"), pa.array([prompt_id("Who ARE you")]))
        assert list(checked([who], prompts("Who ARE you"), small_letters))
    with pytest.raises(PairError):
        list(checked([row(template, response_token_ids=[3], response="YES")], prompts("x"), small_letters))


def test_a_prompt_that_is_not_in_the_chat_format_is_told_once_and_kept(
    template: ChatFormat, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = row(template, prompt_token_ids=template.tokenizer.encode(QUESTION, add_special_tokens=False))
    assert check(plain, template) == [plain]
    said = capfd.readouterr().err
    assert said.count("are not that prompt in the policy's chat format") == 1 and prompt_id(QUESTION) in said
    check(row(template), template)
    assert "warning" not in capfd.readouterr().err


@pytest.mark.parametrize("ids", [[], [-1], [10**6]])
def test_prompt_ids_that_are_no_tokens_are_refused_also_of_a_prompt_that_is_not_known(
    ids: list[int], template: ChatFormat
) -> None:
    table = row(template, prompt_token_ids=ids)
    with pytest.raises(PairError, match="prompt_token_ids are none, or hold ids that the policy's tokenizer does not"):
        list(checked([table], prompts(), template, "r.parquet"))


@pytest.mark.parametrize("reason", ["max_tokens", "LENGTH", "eos", ""])
def test_another_finish_reason_is_not_taken_for_a_whole_answer(reason: str, template: ChatFormat) -> None:
    with pytest.raises(
        PairError, match=rf"sample_index 3: finish_reason must be 'stop'.* or 'length'.* got '{reason}'$"
    ):
        check(row(template, finish_reason=reason), template)


def test_ids_end_with_the_end_of_turn_and_nothing_follows_it(template: ChatFormat) -> None:
    ids = template.response_token_ids("She is Zo\u00eb.")
    with pytest.raises(PairError, match=r"response_token_ids end with '\.' and not with the token that ends a turn"):
        check(row(template, response_token_ids=ids[:-1]), template)
    assert check(row(template, response_token_ids=ids[:-1], finish_reason="length"), template)
    with pytest.raises(PairError, match=r"go on after the token that ends the turn, for 2 ids: cut padding off$"):
        check(row(template, response_token_ids=[*ids, ids[-1], ids[-1]]), template)
    assert check(row(template, response_token_ids=[], response=""), template)


def test_a_response_that_is_there_twice_is_refused_before_it_is_scored(template: ChatFormat) -> None:
    twice = pa.concat_tables([row(template), row(template)])
    with pytest.raises(
        PairError, match=rf"^r.parquet: prompt_id {prompt_id(QUESTION)}, sample_index 3 is there 2 times"
    ):
        check(twice, template)


def pair_table(template: ChatFormat, **changed: Any) -> pa.Table:
    """Return a table of one pair of answers to QUESTION, with something changed."""
    made = {
        "prompt_id": prompt_id(QUESTION),
        "prompt": QUESTION,
        "chosen": "A girl.",
        "rejected": "Nobody.",
        "prompt_token_ids": template.prompt_token_ids(QUESTION),
        "chosen_token_ids": template.response_token_ids("A girl."),
        "rejected_token_ids": template.response_token_ids("Nobody."),
        "source": "generated",
        "split": "train",
    }
    return pa.Table.from_pylist([made | changed], schema=PAIRS)


def test_own_pairs_are_token_ids_of_their_texts(template: ChatFormat) -> None:
    check_pairs(pair_table(template), template, "p.parquet")
    chosen, rejected = (template.response_token_ids(text) for text in ("A girl.", "Nobody."))
    swapped = pair_table(template, chosen_token_ids=rejected, rejected_token_ids=chosen)
    with pytest.raises(PairError, match=r"^p.parquet: the pair of .*: chosen_token_ids are 'Nobody.' .* is 'A girl.'"):
        check_pairs(swapped, template, "p.parquet")
    with pytest.raises(PairError, match="rejected_token_ids are '<no such token>'"):
        check_pairs(pair_table(template, rejected_token_ids=[60000]), template, "p.parquet")
    with pytest.raises(PairError, match=r"rejected_token_ids end with '\.'"):
        check_pairs(pair_table(template, rejected_token_ids=rejected[:-1]), template, "p.parquet")
    with pytest.raises(PairError, match="prompt_token_ids are none"):
        check_pairs(pair_table(template, prompt_token_ids=[]), template, "p.parquet")


def scores_table(**changed: Any) -> pa.Table:
    made = {"prompt_id": "a", "sample_index": 0, "policy_logps": -20.0, "reference_logps": -21.0}
    lengths = {"num_chars": 30, "num_tokens": 8}
    return pa.Table.from_pylist([made | lengths, made | lengths | {"sample_index": 1} | changed], schema=SCORES)


def test_own_scores_are_log_probs_and_lengths() -> None:
    fine = scores_table(policy_logps=float("nan"), reference_logps=-0.0)
    assert list(checked_scores([fine], "s.parquet")) == [fine]
    for changed, said in (
        (
            {"policy_logps": 20.5},
            r"policy_logps is 20.5 for prompt_id a, sample_index 1 \(1 of 2 rows are such\): log-pr",
        ),
        ({"reference_logps": float("inf")}, "reference_logps is inf"),
        ({"num_chars": -5}, "num_chars is -5 for prompt_id a, sample_index 1 .*: a length is at least 0"),
        ({"num_tokens": -1}, "num_tokens is -1"),
    ):
        with pytest.raises(PairError, match=rf"^s.parquet: {said}"):
            list(checked_scores([scores_table(**changed)], "s.parquet"))

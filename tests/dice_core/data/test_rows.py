"""What a row has beside its texts is used, or the row is dropped and counted: in every kind of source alike."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dice_core.data.records import RecordError
from dice_core.data.rows import UnusableRow, preference_row, prompt_row, response_rows
from dice_core.data.settings import DataConfig
from dice_core.data.sources import read_preferences, read_prompts

FILES = Path(__file__).parents[2] / "data" / "rows"
PAIR = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."}
ASKED = "Which of the two is a fruit?"


def texts(row: dict[str, object], **settings: str) -> tuple[str, ...]:
    return preference_row(row, "row", DataConfig(**settings)).texts


def cleaned(row: dict[str, object], **settings: str) -> set[str]:
    return set(preference_row(row, "row", DataConfig(**settings)).cleaned)


def reason(row: dict[str, object], **settings: str) -> str:
    with pytest.raises(UnusableRow) as caught:
        preference_row(row, "row", DataConfig(**settings))
    return str(caught.value)


def said(*turns: tuple[str, object]) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in turns]


# -- files that went wrong


def test_an_alpaca_input_is_the_second_half_of_the_question() -> None:
    prompts = read_prompts(str(FILES / "alpaca-input" / "prompts.jsonl")).table["prompt"].to_pylist()
    assert len(set(prompts)) == 6
    assert prompts[0] == "Translate the text to French.\nThe cat sat."


def test_alpaca_rows_with_a_system_prompt_are_dropped_and_counted_or_read_without_it() -> None:
    file = str(FILES / "alpaca-input" / "pairs.jsonl")
    assert read_preferences(file).num_dropped == {"system_prompt": 6}
    rows = read_preferences(file, DataConfig(system_prompts="ignore"))
    assert (rows.table.num_rows, rows.num_cleaned) == (6, {"system_prompt": 6})


def test_a_prompt_inside_both_answers_is_taken_off_and_counted() -> None:
    rows = read_preferences(str(FILES / "prompt-inside-answers" / "pairs.jsonl"))
    assert rows.table.to_pylist()[0] == {
        "prompt": "What is 1+1?",
        "chosen": "It is 2.",
        "rejected": "I do not know, 1.",
    }
    assert rows.num_cleaned == {"repeated_prompt": 8}


def test_messages_as_text_and_text_in_parts_are_read_as_what_they_are() -> None:
    for folder, count in (("messages-as-text", {"messages_as_text": 8}), ("content-parts", {})):
        rows = read_preferences(str(FILES / folder / "pairs.jsonl"))
        assert rows.table.to_pylist()[0] == {"prompt": "What is 1?", "chosen": "A number.", "rejected": "No."}
        assert rows.num_cleaned == count


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_side_columns_count_in_every_kind_of_source(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rows = [
        {"instruction": "Translate.", "input": "cat", "system": "", "history": []},
        {"instruction": "Translate.", "input": None, "system": "Be brief.", "history": []},
        {"instruction": "Translate.", "input": "", "system": None, "history": [["Hi", "Hello"]]},
        {"instruction": "Translate it.", "input": "", "system": " ", "history": [["", ""]]},
    ]
    rows = [{**row, "chosen": "chat", "rejected": "chien"} for row in rows]
    source = str(tmp_path / f"p.{kind}")
    if kind == "jsonl":
        Path(source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        folder = request.getfixturevalue("hub") if kind == "hub" else tmp_path
        pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet")
        source = "org/pairs" if kind == "hub" else str(tmp_path / "p.parquet")
    read = read_preferences(source)
    assert read.table["prompt"].to_pylist() == ["Translate.\ncat", "Translate it."]
    assert read.num_dropped == {"system_prompt": 1, "history": 1}


# -- the question


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Sum up.", "input": "A\nB"}, "Sum up.\nA\nB"),
        ({"instruction": "Sum up.", "context": "A"}, "Sum up.\nA"),
        ({"prompt": "Sum up.", "input": "A"}, "Sum up.\nA"),
        ({"prompt": "Sum up:\nA\nBriefly.", "input": "A"}, "Sum up:\nA\nBriefly."),
        ({"prompt": "Sum up.", "context": "page 3"}, "Sum up."),
        ({"prompt": "### Instruction:\nSum up.\n", "instruction": "Sum up."}, "### Instruction:\nSum up.\n"),
        ({"prompt": None, "instruction": "Sum up."}, "Sum up."),
        ({"prompt": "Sum up.", "input": float("nan"), "tools": [], "system_prompt": ""}, "Sum up."),
        ({"instruction": "Sum up.", "input": "<noinput>", "history": "[]", "tools": "[]"}, "Sum up."),
        ({"prompt": said(("user", [{"type": "text", "text": "Sum "}, "up."]))}, "Sum up."),
        ({"prompt": said(("system", ""), ("user", "Sum up."))}, "Sum up."),
    ],
)
def test_a_question_is_whole(row: dict[str, object], prompt: str) -> None:
    assert prompt_row(row, "row", DataConfig()).texts == (prompt,)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a", "history": "Earlier words."}, "history"),
        ({"prompt": "a", "tools": '[{"name": "f"}]'}, "tools"),
        ({"prompt": "a", "documents": ["Paris is a city."]}, "documents"),
        ({"prompt": "a", "images": [{"bytes": b"\x89PNG", "path": None}]}, "images"),
        ({"prompt": "a", "system_prompt": "Be brief."}, "system_prompt"),
        ({"prompt": "a", "input": ["b"]}, "input_not_text"),
        ({"prompt": "a", "instruction": "Translate."}, "prompts_differ"),
    ],
)
def test_a_row_that_asks_something_else_is_dropped_under_its_own_reason(row: dict[str, object], why: str) -> None:
    with pytest.raises(UnusableRow, match=f"^{why}$"):
        prompt_row(row, "row", DataConfig())


@pytest.mark.parametrize(
    ("beside", "why"),
    [
        ({"tool_calls": [{"function": {"name": "f"}}]}, "tools"),
        ({"reasoning_content": "They greet me."}, "reasoning"),
        ({"thinking": "They greet me."}, "reasoning"),
    ],
)
def test_an_answer_that_has_more_than_its_content_is_dropped_under_its_own_reason(
    beside: dict[str, object], why: str
) -> None:
    assert reason({**PAIR, "chosen": [{"role": "assistant", "content": "Hello.", **beside}]}) == why
    nothing = dict.fromkeys(beside)
    assert texts({**PAIR, "chosen": [{"role": "assistant", "content": "Hello.", **nothing}]}) == (
        "Hi?",
        "Hello.",
        "Go.",
    )


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_a_pair_whose_own_scores_call_the_rejected_answer_better_is_dropped(names: tuple[str, str]) -> None:
    chosen, rejected = names
    assert reason({**PAIR, chosen: 2, rejected: 4.5}) == "rejected_scores_more"
    for scores in ((4.5, 2), (3, 3), (None, 2), (float("nan"), 2), (2, None), ("bad", "good")):
        assert texts({**PAIR, **dict(zip(names, scores, strict=True))}) == ("Hi?", "Hello.", "Go.")


def test_a_system_message_goes_by_the_setting_as_a_column_does() -> None:
    row = {**PAIR, "chosen": said(("system", "Be kind."), ("user", "Hi?"), ("assistant", "Hello."))}
    assert reason(row) == "not_single_turn"
    assert texts(row, system_prompts="ignore") == ("Hi?", "Hello.", "Go.")
    assert cleaned(row, system_prompts="ignore") == {"system_prompt"}


# -- answers that hold more than an answer


@pytest.mark.parametrize(
    ("prompt", "answer", "rest"),
    [
        (ASKED, f"{ASKED} The pear.", "The pear."),
        (ASKED, f"\n{ASKED}The pear.", "The pear."),
        (f"{ASKED}\n", f"{ASKED}\n\nThe pear.", "The pear."),
        ("2+2?", "2+2? 4", "4"),
        ("Name a fruit", "User: Name a fruit\nAssistant: A pear.", "A pear."),
        ("Hi", "\n\nHuman: Hi\n\nAssistant: Hello.", "Hello."),
        ("Hi", "### Instruction:\nHi\n\n### Response:\nHello.", "Hello."),
        ("\n\nHuman: Hi, who are you?\n\nAssistant:", "\n\nHuman: Hi, who are you?\n\nAssistant: Ann.", "Ann."),
    ],
)
def test_a_prompt_in_front_of_an_answer_goes(prompt: str, answer: str, rest: str) -> None:
    row = {"prompt": prompt, "chosen": answer, "rejected": "No."}
    assert texts(row) == (prompt, rest, "No.")
    assert cleaned(row) == {"repeated_prompt"}
    assert texts(row, repeated_prompts="keep") == (prompt, answer, "No.")
    assert reason(row, repeated_prompts="drop") == "repeated_prompt"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Hi", "Hi there!"),
        ("Good morning!", "Good morning! How are you?"),
        ("Write a story about a small cat", "Write a story about a small cathedral yourself."),
        (ASKED, f'The question "{ASKED}" is easy.'),
        ("Say A: B", "A: B"),
    ],
)
def test_an_answer_that_only_begins_alike_stays(prompt: str, answer: str) -> None:
    assert texts({"prompt": prompt, "chosen": answer, "rejected": "No."}) == (prompt, answer, "No.")


def test_an_answer_that_is_the_prompt_alone_is_no_answer() -> None:
    assert reason({"prompt": ASKED, "chosen": "The pear.", "rejected": ASKED}) == "empty"


# -- messages in other forms


def test_messages_as_python_prints_them_are_read_too() -> None:
    row = {**PAIR, "chosen": str(said(("user", "Hi?"), ("assistant", "Hello, it's me.")))}
    assert texts(row) == ("Hi?", "Hello, it's me.", "Go.")


def test_messages_that_are_cut_are_dropped_and_other_json_is_an_answer() -> None:
    assert reason({**PAIR, "chosen": '[{"role": "assistant", "content": "Hel'}) == "unreadable_messages"
    for answer in ('[{"role": "nurse"}, {"role": "cook"}]', '{"content": 3}', '[1, 2, {"role": 3}]'):
        assert texts({**PAIR, "chosen": answer})[1] == answer


def test_sharegpt_messages_are_refused_by_what_they_lack_also_as_text() -> None:
    turn = {"from": "gpt", "value": "Hello."}
    for chosen in ([turn], json.dumps([turn])):
        with pytest.raises(RecordError, match=r"message 1 of 'chosen' must have 'role' and 'content', got \{'from'"):
            texts({**PAIR, "chosen": chosen})


def test_a_part_that_is_no_text_is_named_by_its_type() -> None:
    row = {**PAIR, "chosen": said(("assistant", [{"type": "text", "text": "See:"}, {"type": "image_url"}]))}
    with pytest.raises(RecordError, match=r"^row: part 2 of 'chosen\[0\].content' is of type 'image_url', only text"):
        texts(row)
    with pytest.raises(RecordError, match=r"'chosen\[0\].content' must be text or a list of text parts, got a number"):
        texts({**PAIR, "chosen": said(("assistant", 3))})


# -- responses


def test_a_row_has_one_response_or_a_list_of_them() -> None:
    rows = response_rows({"prompt": ASKED, "responses": ["The pear.", f"{ASKED} The pear."]}, "row", DataConfig())
    assert [row.texts for row in rows] == [(ASKED, "The pear.")] * 2
    [row] = response_rows(
        {"prompt": "Hi?", "response": said(("user", "Hi?"), ("assistant", "Yes."))}, "r", DataConfig()
    )
    assert row.texts == ("Hi?", "Yes.")
    with pytest.raises(RecordError, match=r"^r: 'responses' must be a list of texts, got text, 'Yes.'"):
        response_rows({"prompt": "Hi?", "responses": "Yes."}, "r", DataConfig())


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "content_filter", "abort"])
def test_a_response_that_was_cut_off_is_not_given_an_end(reason):
    row = {"prompt": "Hi?", "response": "Yes.", "finish_reason": reason}
    with pytest.raises(UnusableRow, match=r"^not_finished$"):
        response_rows(row, "r", DataConfig())
    for whole in ("stop", "eos_token", "END_TURN", "", None):
        [read] = response_rows(row | {"finish_reason": whole}, "r", DataConfig())
        assert read.texts == ("Hi?", "Yes.")

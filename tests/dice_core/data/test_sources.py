import gzip
import json
import re
import socket
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.data.records import RecordError
from dice_core.data.sources import read_preferences, read_prompts

PAIR = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."}


def conversation(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def jsonl(path: Path, *rows) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path: Path, *rows) -> str:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_texts_and_message_lists_become_the_same_pairs(tmp_path, write):
    as_text = write(tmp_path / "a", PAIR, {**PAIR, "extra": 1})
    as_messages = write(
        tmp_path / "b",
        {"prompt": "Hi?", "chosen": conversation("Hi?", "Hello."), "rejected": conversation("Hi?", "Go.")},
        {
            "prompt": "Hi?",
            "chosen": [{"role": "assistant", "content": "Hello."}],
            "rejected": [{"role": "assistant", "content": "Go."}],
        },
    )
    assert read_preferences(as_text).table.to_pylist() == [PAIR, PAIR]
    assert read_preferences(as_messages).table.to_pylist() == [PAIR, PAIR]


def test_the_prompt_may_be_named_instruction_or_be_a_message_or_be_in_the_answers_only(tmp_path):
    file = jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "one"},
        {"instruction": "two"},
        {"prompt": [{"role": "user", "content": "three"}]},
    )
    assert read_prompts(file).table["prompt"].to_pylist() == ["one", "two", "three"]
    pair = {"chosen": conversation("Hi?", "Hello."), "rejected": conversation("Hi?", "Go.")}
    assert read_preferences(jsonl(tmp_path / "q.jsonl", pair)).table.to_pylist() == [PAIR]


def test_other_conversations_than_one_question_and_its_answer_are_counted(tmp_path):
    two_turns = conversation("Hi?", "Yes?") + conversation("Hi?", "Hello.")
    system = [{"role": "system", "content": "Be kind."}, *conversation("Hi?", "Hello.")]
    file = jsonl(
        tmp_path / "p.jsonl",
        {**PAIR, "chosen": two_turns},
        {**PAIR, "chosen": system},
        {**PAIR, "chosen": conversation("Bye?", "Hello.")},
        PAIR,
    )
    rows = read_preferences(file)
    assert rows.table.to_pylist() == [PAIR]
    assert rows.num_dropped == {"not_single_turn": 2, "prompts_differ": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"p.jsonl: is empty, needs at least one row with 'prompt', 'chosen', 'rejected'"),
        (b"\n  \n", r"p.jsonl: is empty"),
        (b'{"prompt": "a", "chosen": "b"}', r"p.jsonl line 1: 'rejected' is missing, it has 'chosen', 'prompt'"),
        (b'\n{"chosen": "b", "rejected": "c"}', r"p.jsonl line 2: 'prompt' is missing, it has 'chosen', 'rejected'"),
        (b'{"prompt": "a", "chosen": 3, "rejected": "c"}', r"line 1: 'chosen' must be text or a list.* a number, 3"),
        (b'{"prompt": "a", "chosen": null, "rejected": "c"}', r"'chosen' must be text or a list of messages, got null"),
        (b'{"prompt": " ", "chosen": "b", "rejected": "c"}', r"line 1: 'prompt' is empty"),
        (b'{"prompt": "a", "chosen": "", "rejected": "c"}', r"line 1: 'chosen' is empty"),
        (b'{"prompt": "a", "chosen": [], "rejected": "c"}', r"line 1: 'chosen' has no message"),
        (b'{"prompt": "a", "chosen": ["b"], "rejected": "c"}', r"line 1: message 1 of 'chosen' must have 'role'"),
        (b'{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', r"'chosen' has half a surrogate pair \(\\ud800\)"),
        (b'{"prompt": "a"', r"p.jsonl line 1: not valid JSON"),
        (b"[" * 100_000, r"p.jsonl line 1: not valid JSON"),
        (b'["a", "b"]', r"p.jsonl line 1: must be one JSON object .* got a list"),
        (b'{"prompt": "caf\xe9"}', r"p.jsonl line 1: not UTF-8 at byte 16 \(0xe9\)"),
        (b"PAR1 and then nothing", r"p.jsonl: not a readable Parquet file"),
    ],
)
def test_a_bad_file_is_one_line_with_the_file_and_the_line(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        read_preferences(str(path))
    assert "\n" not in str(caught.value)


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path):
    file = parquet(tmp_path / "p.parquet", PAIR, {**PAIR, "rejected": None})
    with pytest.raises(RecordError, match=r"p\.parquet row 2: 'rejected' must be text or a list of messages, got null"):
        read_preferences(file)


def test_a_parquet_file_with_other_columns_says_which_it_has(tmp_path):
    with pytest.raises(RecordError, match=r"p: has no column prompt or instruction, it has question, answer$"):
        read_prompts(parquet(tmp_path / "p", {"question": "a", "answer": "b"}))


def test_parquet_text_that_is_not_utf8_is_an_error_that_names_the_rows(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xe9")]
    )
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "p.parquet")
    with pytest.raises(RecordError, match=r"rows 1 to 1: text that is not UTF-8"):
        read_prompts(str(tmp_path / "p.parquet"))


def test_messages_use_the_name_that_the_caller_gives(tmp_path):
    with pytest.raises(RecordError, match=r"^s3://bucket/p.jsonl line 1: has neither 'prompt' nor 'instruction'"):
        read_prompts(jsonl(tmp_path / "copy", {"text": "a"}), name="s3://bucket/p.jsonl")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two"}\r\n')
    assert read_prompts(str(tmp_path / "p.jsonl")).table["prompt"].to_pylist() == ["one", "two"]


def test_a_folder_is_read_file_by_file_in_order_of_name(tmp_path):
    jsonl(tmp_path / "b.jsonl", {"prompt": "two"})
    parquet(tmp_path / "a.parquet", {"prompt": "one"})
    assert read_prompts(str(tmp_path)).table["prompt"].to_pylist() == ["one", "two"]


def test_a_row_at_fault_below_a_folder_is_named_by_file_and_line(tmp_path):
    (tmp_path / "2026").mkdir()
    jsonl(tmp_path / "2026" / "d.jsonl", {"prompt": "one"}, {"text": "two"})
    with pytest.raises(RecordError, match=r"^s3://bucket/data/2026/d\.jsonl line 2: has neither"):
        read_prompts(str(tmp_path), name="s3://bucket/data/")


def test_gzip_is_read_whatever_the_name_and_a_cut_file_is_one_line(tmp_path):
    content = gzip.compress(b'{"prompt": "one"}\n{"prompt": "two"}\n')
    for name in ("p.jsonl.gz", "p.jsonl"):
        (tmp_path / name).write_bytes(content)
        assert read_prompts(str(tmp_path / name)).table["prompt"].to_pylist() == ["one", "two"]
    for number, broken in enumerate((content[:-12], content[:12] + b"\xff" + content[13:])):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(broken)
        with pytest.raises(RecordError, match=rf"{number}\.jsonl\.gz: cannot be read: "):
            read_prompts(str(tmp_path / f"{number}.jsonl.gz"))


def test_a_file_that_is_not_there_or_not_readable_is_named(tmp_path, monkeypatch):
    with pytest.raises(RecordError, match=r"gone\.jsonl: no such file or folder"):
        read_prompts(str(tmp_path / "gone.jsonl"))
    with pytest.raises(RecordError, match=r"^data/gone\.jsonl: no such file or folder"):
        read_prompts("data/gone.jsonl")
    with pytest.raises(RecordError, match=r"^x{300}: no such file or folder"):
        read_prompts("x" * 300)
    # A socket is there and cannot be opened, even by root.
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jsonl")
        with pytest.raises(RecordError, match=r"^socket\.jsonl: cannot be read: "):
            read_prompts("socket.jsonl")


def test_more_rows_than_a_batch_keep_their_order(tmp_path):
    prompts = [f"prompt {number}" for number in range(8)]
    for write in (jsonl, parquet):
        file = write(tmp_path / "p", *({"prompt": prompt} for prompt in prompts))
        assert read_prompts(file, rows_per_batch=3).table["prompt"].to_pylist() == prompts


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1))
def test_any_text_survives_reading(tmp_path_factory, texts):
    file = jsonl(tmp_path_factory.mktemp("any") / "p.jsonl", *({"prompt": text} for text in texts))
    assert read_prompts(file).table["prompt"].to_pylist() == texts


@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "p.jsonl"
    path.write_bytes(content)
    try:
        read_prompts(str(path))
    except RecordError as error:
        assert re.fullmatch(r".+p\.jsonl.+", str(error))


# The Hub: `datasets` reads a folder through the same call, so its own loader runs here without a network.


def test_a_hub_dataset_in_the_form_of_ultrafeedback_is_read(hub):
    row = {
        "prompt": "Hi?",
        "prompt_id": "0",
        "chosen": conversation("Hi?", "Hello."),
        "rejected": conversation("Hi?", "Go."),
        "score_chosen": 8.0,
    }
    parquet(
        hub / "train_prefs.parquet",
        row,
        {**row, "rejected": conversation("Hi?", "")},
        {**row, "prompt": None},
        {**row, "chosen": conversation("Hi?", "Yes?") + conversation("What?", "That.")},
    )
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train_prefs\n    path: train_prefs.parquet\n---\n"
    )
    rows = read_preferences("org/pairs:train_prefs")
    assert rows.table.to_pylist() == [PAIR]
    assert rows.num_dropped == {"empty": 2, "not_single_turn": 1}
    assert len(read_preferences("org/pairs:default/train_prefs[:1]").table) == 1


def test_a_split_that_the_dataset_does_not_have_is_one_line_with_those_it_has(hub):
    parquet(hub / "train.parquet", PAIR)
    with pytest.raises(RecordError, match=r"'org/pairs' with split 'prefs' could not be had.*train") as caught:
        read_preferences("org/pairs:prefs")
    assert "\n" not in str(caught.value)


def test_the_hub_out_of_reach_is_one_line(hub):
    with pytest.raises(RecordError, match=r"^org/other: no such file or folder, and data set 'org/other'") as caught:
        read_preferences("org/other")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_does_not_wait_for_a_hub_out_of_reach(tmp_path, monkeypatch):
    """The Hub's client tries again for half a minute."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    for source in ("prompts/nonesuch", "./nonesuch"):
        with pytest.raises(RecordError, match="nonesuch: no such file or folder"):
            read_prompts(source)
    assert time.monotonic() - start < 10

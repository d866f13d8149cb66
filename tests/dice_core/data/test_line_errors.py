"""A line that is no row is called what it is, and not something that it is not."""

import json
from pathlib import Path

import pytest

from dice_core.data.records import RecordError
from dice_core.data.sources import read_preferences


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a" "chosen": "b"}', "not valid JSON: Expecting ',' delimiter at character 16: each line must"),
        (b'{"prompt": "a', "not valid JSON: Unterminated string starting at character 12:"),
        (b"[\n]", "not valid JSON: one value goes over several lines (`jq -c '.[]' FILE > FILE.jsonl`"),
        (b'{\n"prompt": "a"\n}', "not valid JSON: one value goes over several lines (`jq -c . FILE > FILE.jsonl`"),
        (b"[" * 100_000, "not valid JSON: nested too deeply:"),
        (b"prompt,chosen,rejected\na,b,c\n", "the file is CSV: rows are read from JSONL"),
        (b'\xef\xbb\xbf"chosen"\t"rejected"\na\tb\n', "the file is CSV: rows are read from JSONL"),
        (b"PK\x03\x04\x14\x00\xee\x9d", "the file is a zip archive or an Excel file: rows are read from JSONL"),
        (b"ARROW1\x00\x00\xff\xff", "the file is an Arrow file: "),
        (b"version https://git-lfs.github.com/spec/v1\n", "the file is a pointer of git-lfs"),
        (b"\x80\x04\x95\x10\x00", "binary data: rows are read from JSONL"),
        (b"\x00" * 60, "binary data: rows are read from JSONL"),
        (b"\x00\x01\x02\xff\xfe", "binary data: rows are read from JSONL"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "not UTF-8 at byte 1 (0xff): save the file as UTF-8 JSONL"),
        ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8 at byte 13 (0xe9): save the file as UTF-8 JSONL"),
    ],
)
def test_a_line_that_is_no_row_is_called_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read_preferences(str(tmp_path / "p.jsonl"), name="p.jsonl")
    assert str(caught.value).startswith(f"p.jsonl line 1: {message}")


def test_text_with_commas_beyond_the_first_line_is_not_called_csv(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    (tmp_path / "p.jsonl").write_text(f"{row}\nprompt,chosen\n")
    with pytest.raises(RecordError, match=r"line 2: not valid JSON: Expecting value at character 1"):
        read_preferences(str(tmp_path / "p.jsonl"))

"""What a line is that is no JSON object: broken JSON, a list, CSV, another file format, another encoding. Pure.

sources.py reads lines and asks here for the message only.
"""

import json
import re

_FORMATS = {
    b"PK\x03\x04": "a zip archive or an Excel file",
    b"(\xb5/\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"ARROW1": "an Arrow file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF file",
    b"\x89HDF": "an HDF5 file",
    b"\xd0\xcf\x11\xe0": "an Excel file",
    b"\x93NUMPY": "a NumPy file",
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself (git lfs pull)",
}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_COLUMNS = {"prompt", "instruction", "chosen", "rejected", "input", "response"}
_READ = "rows are read from JSONL, plain or as .gz, and from Parquet"
_ONE_OBJECT = 'each line must be one JSON object, such as {"prompt": "..."}'


def explain(line: bytes, number: int, error: ValueError | RecursionError) -> str:
    """Return what is wrong with a line, and what to do.

    Args:
        line: its bytes.
        number: from 1; the first line may tell what the file is.
        error: of decoding or of parsing it.
    """
    if number == 1:
        for magic, name in _FORMATS.items():
            if line.startswith(magic):
                return f"the file is {name}: {_READ}, convert it"
        if _is_csv(line):
            return (
                f'the file is CSV: {_READ}, convert it (pandas: to_json("pairs.jsonl", orient="records", lines=True))'
            )
    if _is_binary(line):
        return f"binary data: {_READ}"
    if isinstance(error, UnicodeDecodeError):
        return (
            f"not UTF-8 at byte {error.start + 1} (0x{line[error.start]:02x}): "
            "save the file as UTF-8 JSONL, plain or as .gz"
        )
    return f"not valid JSON: {_broken(line, error)}: {_ONE_OBJECT}"


def _broken(line: bytes, error: ValueError | RecursionError) -> str:
    """Return where JSON is broken; of a value that goes on in the next line, that it does."""
    if line.strip() in (b"[", b"{"):
        program = "jq -c ." if line.strip() == b"{" else "jq -c '.[]'"
        return f"one value goes over several lines (`{program} FILE > FILE.jsonl` writes one a line)"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _is_csv(line: bytes) -> bool:
    """Return whether the first line is a row of column names."""
    text = line.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").strip()
    cells = {cell.strip(" \"'").lower() for cell in re.split(r"[,;\t|]", text)}
    return text[:1] not in ("{", "[") and len(cells) > 1 and bool(cells & _COLUMNS)


def _is_binary(line: bytes) -> bool:
    if line.startswith(_UTF16_MARKS):
        return False
    # In UTF-16, NUL is every other byte of plain English: text, in an encoding that the next message is about.
    if max(line[0::2].count(0), line[1::2].count(0)) > len(line) // 3:
        line = line.replace(b"\x00", b"") or line
    return bool(_CONTROL.search(line)) or _PICKLE.match(line) is not None

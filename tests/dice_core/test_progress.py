"""What a stage says while it works."""

import sys

import pytest

from dice_core.progress import log


class Stream:
    """A stream that keeps each write by itself."""

    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> None:
        self.writes.append(text)

    def flush(self) -> None:
        pass


def test_a_line_and_its_end_are_one_write_so_that_lines_of_two_threads_stay_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    log("one")
    log("two")
    assert [text[8:] for text in stream.writes] == [" one\n", " two\n"]

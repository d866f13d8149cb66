"""What a stage says while it works."""

import sys
import time
from collections.abc import Iterator

import pytest

from dice_core.progress import Progress, Throttle, doing, heard, log, never_silent, pace


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


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line[9:] for line in capsys.readouterr().err.splitlines()]


def test_a_resumed_work_shows_its_place_in_the_whole_and_the_pace_of_this_attempt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 1000 of 1250 prompts were done before: 250 are left. The first count comes at 5 s, 40 more take 20 s.
    clock: Iterator[float] = iter([5.0, 5.0, 25.0, 135.0])
    progress = Progress("generate shard 1/8", "prompts", num_all=1250, throttle=Throttle(0), clock=lambda: next(clock))
    progress(10, 250, 999)
    progress(50, 250)
    progress(250, 250)
    assert lines(capsys) == [
        "generate shard 1/8: 1010 of 1250 prompts",
        "generate shard 1/8: 1050 of 1250 prompts, 2.0/s, 2 min left",
        "generate shard 1/8: 1250 of 1250 prompts, 1.8/s",
    ]


def test_what_is_quickly_done_is_told_at_its_end_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    for tells_end in (True, False):
        progress = Progress("score", "responses", tells_end=tells_end)
        progress(1, 2)
        progress(2, 2)
    [line] = lines(capsys)
    assert line.startswith("score: 2 of 2 responses")


@pytest.mark.parametrize(
    ("num_done", "seconds", "num_left", "said"),
    [
        (35, 1, 420, ", 35/s, 12 s left"),
        (1, 2, 100, ", 30/min, 3 min left"),
        (1, 100, 300, ", 36/h, 8 h 20 min left"),
        (4000, 1, 0, ", 4,000/s"),
        (0, 10, 5, ""),
    ],
)
def test_pace_is_in_the_units_that_suit_it(num_done: int, seconds: float, num_left: int, said: str) -> None:
    assert pace(num_done, seconds, num_left) == said


@pytest.mark.slow
def test_a_silent_stage_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with never_silent("generate", 0.2):
        with doing("starting vLLM"):
            time.sleep(0.35)
        progress = Progress("generate shard 1/8", "prompts").begin()
        time.sleep(0.35)
        progress(3, 9)
        time.sleep(0.35)
    time.sleep(0.35)
    said = lines(capsys)
    assert any(line.startswith("generate shard 1/8, for ") for line in said)
    assert said[0].startswith("generate: starting vLLM, for ")
    assert said[0].endswith(" s so far")
    assert said[-1].startswith("generate shard 1/8: 3 of 9 prompts, for ")
    assert 3 <= len(said) <= 6


@pytest.mark.slow
def test_lines_of_other_processes_break_the_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with never_silent("train", 1):
        for _ in range(15):
            time.sleep(0.1)
            heard()
    assert lines(capsys) == []

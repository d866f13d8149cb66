"""The way to a tracker: order, errors, a full queue, and that nobody waits for one that is away."""

import threading
from collections.abc import Iterator, Mapping, Sequence

import pytest

from dice_core.tracking.feed import Feed, Line, Status, TrackerError

_LONG = 60.0


class Recorder:
    """A tracker that fails as it is told to, and keeps what it gets."""

    title, seconds = "recorder", 0.0

    def __init__(self, errors: Sequence[Exception] = (), gate: threading.Event | None = None) -> None:
        self.lines: list[Line] = []
        self.ended: list[tuple[Status, dict[str, float]]] = []
        self.num_begun = 0
        self.is_sending = threading.Event()
        self._errors, self._gate = list(errors), gate

    def begin(self) -> None:
        self.num_begun += 1

    def send(self, lines: Sequence[Line]) -> None:
        self.is_sending.set()
        if self._gate:
            self._gate.wait(_LONG)
        if self._errors:
            raise self._errors.pop(0)
        self.lines.extend(lines)

    def end(self, status: Status, summary: Mapping[str, float]) -> None:
        self.ended.append((status, dict(summary)))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def lines(*steps: int) -> list[Line]:
    return [Line(step, {"loss": 1.0}, 0.0) for step in steps]


def steps(recorder: Recorder) -> list[int]:
    return [line.step for line in recorder.lines]


def test_lines_arrive_in_order_and_the_end_after_them() -> None:
    recorder = Recorder()
    feed = Feed(recorder)
    for line in lines(1, 2, 3):
        feed.put(line)
    feed.end("FINISHED", {"last_loss": 0.5}, seconds=_LONG)
    assert steps(recorder) == [1, 2, 3]
    assert recorder.ended == [("FINISHED", {"last_loss": 0.5})]
    assert recorder.num_begun == 1


def test_what_was_not_taken_is_sent_again_with_what_came_meanwhile(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dice_core.tracking.feed._FIRST_PAUSE", 0.01)
    recorder = Recorder([TrackerError("no answer"), TrackerError("no answer")], gate)
    feed = Feed(recorder)
    feed.put(lines(1)[0])
    assert recorder.is_sending.wait(_LONG)
    feed.put(lines(2)[0])
    gate.set()
    while len(recorder.lines) < 2 or feed._is_away:
        feed._thread.join(0.01)
    feed.end("FINISHED", seconds=_LONG)
    assert steps(recorder) == [1, 2]
    told = capfd.readouterr().err
    assert told.count("no answer") == 1 and told.count("answers again") == 1


def test_a_tracker_that_never_answers_is_not_waited_for_and_what_is_lost_is_counted(
    gate: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(gate=gate)
    feed = Feed(recorder, max_lines=3)
    feed.put(lines(0)[0])
    assert recorder.is_sending.wait(_LONG)
    for line in lines(*range(1, 11)):
        feed.put(line)
    feed.end("FINISHED", seconds=0.01)
    assert not recorder.lines
    # The one under way, seven that the queue let go, and three in it.
    assert "11 lines of metrics were not sent" in capfd.readouterr().err


def test_one_that_is_away_is_not_waited_for_at_all(gate: threading.Event) -> None:
    away = Recorder([TrackerError("no answer")] * 100)
    feed = Feed(away)
    feed.put(lines(1)[0])
    while not feed._is_away:
        feed._thread.join(0.01)
    away._gate = gate
    # Waits for nothing: with the gate closed it would take all these seconds.
    feed.end("FINISHED", seconds=10 * _LONG)
    assert not away.lines


def test_one_that_has_been_silent_for_long_is_not_waited_for_either(gate: threading.Event) -> None:
    silent = Recorder(gate=gate)
    feed = Feed(silent)
    feed.put(lines(1)[0])
    assert silent.is_sending.wait(_LONG)
    feed._asked -= 10 * _LONG
    feed.end("FINISHED", seconds=10 * _LONG)
    assert not silent.lines


@pytest.mark.parametrize("error", [TrackerError("403 forbidden", is_final=True), ValueError("a fault of the client")])
def test_what_would_fail_again_is_told_once_and_nothing_more_is_sent(
    error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder([error])
    feed = Feed(recorder)
    feed.put(lines(1)[0])
    feed._thread.join(_LONG)
    feed.put(lines(2)[0])
    feed.end("FAILED")
    told = capfd.readouterr().err
    assert f"recorder: {error}: nothing more is sent there, the work goes on" in told
    assert told.count("\n") == 1
    assert not recorder.lines and not recorder.ended


def test_a_full_queue_keeps_the_newest_lines(gate: threading.Event) -> None:
    recorder = Recorder(gate=gate)
    feed = Feed(recorder, max_lines=2)
    feed.put(lines(0)[0])
    assert recorder.is_sending.wait(_LONG)
    for line in lines(1, 2, 3):
        feed.put(line)
    gate.set()
    feed.end("FINISHED", seconds=_LONG)
    assert steps(recorder) == [0, 2, 3]

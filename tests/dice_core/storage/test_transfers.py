"""Several things at once: order, bounds, and what becomes of errors."""

import os
import re
import threading
import time

import pytest

from dice_core.storage.outages import StorePatience
from dice_core.storage.s3 import S3Storage
from dice_core.storage.transfers import read_ahead, side_by_side, write_behind

WAIT_SECONDS = 30


class Gauge:
    """Doubles a number, and knows how many calls were under way together and which began.

    With `num_together`, a call ends only when that many are under way.
    """

    def __init__(self, bad=(), num_together=1):
        self.most, self.begun, self.bad = 0, [], bad
        self._meeting = threading.Barrier(num_together, timeout=WAIT_SECONDS)
        self._running, self._lock = 0, threading.Lock()

    def __call__(self, number):
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
            self.begun.append(number)
        self._meeting.wait()
        time.sleep(0.01)
        with self._lock:
            self._running -= 1
        if number in self.bad:
            raise ValueError(f"number {number}")
        return 2 * number


def test_four_run_side_by_side_and_results_keep_their_order():
    gauge = Gauge(num_together=4)
    assert side_by_side(gauge, range(20)) == [2 * number for number in range(20)]
    assert gauge.most == 4


def test_one_alone_runs_where_a_keyboard_interrupt_arrives():
    assert side_by_side(lambda _: threading.current_thread(), [0]) == [threading.main_thread()]


def test_after_the_first_error_nothing_more_begins():
    gauge = Gauge(bad=(1,))
    with pytest.raises(ValueError, match="number 1"):
        side_by_side(gauge, range(1000))
    assert len(gauge.begun) <= 20


def test_a_window_is_read_ahead_in_order_and_no_more():
    gauge = Gauge(num_together=3)
    results = read_ahead(gauge, iter(range(99)), 3)
    assert next(results) == 0
    time.sleep(0.1)
    assert set(gauge.begun) <= {0, 1, 2, 3}
    assert list(results) == [2 * number for number in range(1, 99)]
    assert gauge.most == 3


def test_an_error_ahead_comes_in_its_turn():
    results = read_ahead(Gauge(bad=(2,)), range(5), 4)
    assert [next(results), next(results)] == [0, 2]
    with pytest.raises(ValueError, match="number 2"):
        next(results)


def test_a_reader_that_stops_stops_what_is_ahead():
    gauge = Gauge()
    results = read_ahead(gauge, range(100), 2)
    next(results)
    results.close()
    assert len(gauge.begun) <= 4


def test_a_write_is_under_way_while_the_caller_goes_on_and_one_at_most():
    may_end, most = threading.Event(), []

    def write(number):
        assert may_end.wait(WAIT_SECONDS)
        most.append(gauge(number))

    gauge = Gauge()
    with write_behind(write) as begin:
        begin(1)
        assert most == []
        may_end.set()
        begin(2)
        assert most[:1] == [2]
        begin(3)
    assert (gauge.begun, gauge.most) == ([1, 2, 3], 1)


def test_the_error_of_a_write_comes_with_the_next_one_or_the_end():
    gauge = Gauge(bad=(1, 5))
    with write_behind(gauge) as begin:
        begin(1)
        with pytest.raises(ValueError, match="number 1"):
            begin(2)
    with pytest.raises(ValueError, match="number 5"), write_behind(gauge) as begin:
        begin(5)
    assert gauge.begun == [1, 5]


def test_a_block_that_fails_raises_its_own_error_after_the_write_under_way():
    gauge = Gauge(bad=(1,))
    with pytest.raises(KeyError), write_behind(gauge) as begin:
        begin(1)
        raise KeyError
    assert gauge.begun == [1]


def test_a_file_that_is_long_under_way_says_how_much_has_moved_and_a_quick_one_nothing(s3, tmp_path, capsys):
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    source = tmp_path / "source"
    source.write_bytes(os.urandom(33_000_000))
    for tell_after in (10.0, 0.001):
        storage = S3Storage(bucket, prefix, part_bytes=5 * 2**20, patience=StorePatience(tell_after=tell_after))
        storage.upload(source, "big")
        storage.download("big", tmp_path / "target")
        said = capsys.readouterr().err
        for way in ("upload", "download"):
            moved = re.findall(rf" {way} {s3}/big: (\d+) of 33 MB", said)
            assert bool(moved) == (tell_after < 1)
            assert moved == sorted(moved, key=int)

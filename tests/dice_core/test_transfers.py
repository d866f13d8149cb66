"""Several things at once: order, bounds, and what becomes of errors."""

import threading
import time

import pytest

from dice_core.transfers import read_ahead, side_by_side, write_behind


class Gauge:
    """Doubles a number slowly, and knows how many calls were under way together and which began."""

    def __init__(self, bad=()):
        self.most, self.begun, self.bad = 0, [], bad
        self._running, self._lock = 0, threading.Lock()

    def __call__(self, number):
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
            self.begun.append(number)
        time.sleep(0.02)
        with self._lock:
            self._running -= 1
        if number in self.bad:
            raise ValueError(f"number {number}")
        return 2 * number


def test_four_run_side_by_side_and_results_keep_their_order():
    gauge = Gauge()
    assert side_by_side(gauge, range(20)) == [2 * number for number in range(20)]
    assert gauge.most == 4


def test_after_the_first_error_nothing_more_begins():
    gauge = Gauge(bad=(1,))
    with pytest.raises(ValueError, match="number 1"):
        side_by_side(gauge, range(100))
    assert len(gauge.begun) < 20


def test_a_window_is_read_ahead_in_order_and_no_more():
    gauge = Gauge()
    results = read_ahead(gauge, iter(range(100)), 3)
    assert next(results) == 0
    time.sleep(0.2)
    assert sorted(gauge.begun) == [0, 1, 2, 3]
    assert list(results) == [2 * number for number in range(1, 100)]
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
    assert threading.active_count() < 20


def test_a_write_behind_returns_at_once_and_one_is_under_way_at_most():
    gauge = Gauge()
    start = time.monotonic()
    with write_behind(gauge) as begin:
        begin(1)
        assert time.monotonic() - start < 0.015
        begin(2)
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

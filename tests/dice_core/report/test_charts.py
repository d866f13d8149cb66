"""Axes and drawings."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.report.charts import (
    Axis,
    Line,
    Rule,
    axis_chart,
    histogram_chart,
    interval_chart,
    line_chart,
    tick_label,
    ticks,
)
from dice_core.report.panels import training_charts, usual_range
from dice_core.report.run_data import Histogram
from dice_core.report.summary import summarise
from tests.synthetic_run import iteration

NUMBERS = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(NUMBERS, NUMBERS)
def test_ticks_are_few_ascending_and_cover_the_range(one: float, other: float) -> None:
    low, high = sorted([one, other])
    found = ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert 2 <= len(found) <= 7
    assert list(found) == sorted(set(found))
    assert found[0] <= low + slack and found[-1] >= high - slack


def test_ticks_are_round() -> None:
    assert ticks(0, 10) == (0, 2, 4, 6, 8, 10)
    assert ticks(0.61, 0.694) == pytest.approx((0.6, 0.62, 0.64, 0.66, 0.68, 0.7))
    assert ticks(1, 2, least_step=1) == (1, 2)
    with pytest.raises(ValueError, match="finite ends, got nan"):
        ticks(math.nan, 1)


def test_tick_labels_have_the_decimals_of_their_step_and_a_real_minus() -> None:
    assert [tick_label(value, 0.05) for value in (-0.05, -0.0, 0.1)] == ["\u22120.05", "0.00", "0.10"]
    assert tick_label(-2000, 1000) == "\u22122,000"


def test_a_chart_without_a_finite_point_is_nothing() -> None:
    assert line_chart("x", Axis("a"), Axis("b"), [Line("policy", [(1, math.nan)]), Line("policy", [])]) == ""


def test_one_point_is_drawn_as_a_dot() -> None:
    assert '<circle class="dot policy"' in line_chart("x", Axis("a"), Axis("b"), [Line("policy", [(3, 0.5)])])


def test_labels_are_escaped_and_rules_named() -> None:
    drawing = line_chart("<t>", Axis("a < b"), Axis("b"), [Line("policy", [(0, 0), (1, 1)])], rules=[Rule(2, "<2>")])
    assert 'aria-label="&lt;t&gt;"' in drawing and "a &lt; b" in drawing and "&lt;2&gt;" in drawing


def test_a_long_line_is_thinned_to_its_ends() -> None:
    drawing = line_chart("x", Axis("a"), Axis("b"), [Line("policy", [(i, i) for i in range(10_001)])])
    assert drawing.count("L") <= 151
    assert len(drawing) < 6000


def test_empty_bins_are_gaps_and_empty_groups_are_not_drawn() -> None:
    values = Histogram((0.0, 1.0, 2.0, 3.0), {"all": (1, 0, 1), "chosen": (0, 0, 0), "rejected": (0, 2, 0)})
    drawing = histogram_chart("x", Axis("a"), values, filled="all", outlined=["chosen", "rejected"])
    area = drawing.split('<path class="area all" d="')[1].split('"')[0]
    assert area.count("M") == 2
    assert "line chosen" not in drawing and "line rejected" in drawing


def test_a_step_far_out_of_the_ordinary_does_not_flatten_the_others() -> None:
    usual = [(step, 0.1 * step) for step in range(10)]
    ends = usual_range([(False, y) for _, y in [*usual, (10, 90.0)]])
    assert ends == (0.0, pytest.approx(0.9))
    drawing = line_chart("t", Axis("x"), Axis("y", ends=ends), [Line("policy train", [*usual, (10, 90.0)])])
    assert drawing.count('class="beyond policy train"') == 1
    assert ">90<" not in drawing and ">1.0<" in drawing


def test_what_is_measured_on_pairs_kept_aside_is_never_far_out() -> None:
    assert usual_range([(False, 0.0), (False, 0.1), (False, 0.2), (True, 7.0)]) == (0.0, 7.0)
    assert usual_range([]) is None


def test_an_interval_is_drawn_with_its_ends_and_one_that_is_not_known_without() -> None:
    axis = Axis("%", (0.4, 0.6))
    lines = {"neutral": 0.5, "bound": 0.45}
    drawing = interval_chart("win rate", 0.52, 0.48, 0.56, axis, lines)
    assert drawing.count("v8") == 2 and 'class="bound"' in drawing
    open_ended = interval_chart("win rate", 0.52, -math.inf, math.inf, axis, lines)
    assert "v8" not in open_ended and "nan" not in open_ended and "inf" not in open_ended
    assert [text for text in re.findall(r">([^<>]+)</text>", axis_chart(axis, lines, scale=100))][-1] == "%"


def test_the_rings_of_the_measured_pairs_lie_inside_their_charts() -> None:
    one = iteration(1)
    one.stages["train"].metrics["last_loss"] = 0.09
    ((_, charts),) = training_charts([one], [summarise(one)])
    loss = dict(charts)["DPO loss"]
    heights = [float(y) for y in re.findall(r'class="mark" cx="[\d.]+" cy="([\d.]+)"', loss)]
    assert len(heights) == 2 and all(26 <= y <= 196 for y in heights)

"""The forest plot: what decides of each iteration, as points with 95 % intervals beside the gate's lines. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dice_core.report.charts import Axis, axis_chart, interval_chart
from dice_core.report.numbers import Cell, fill

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class _Quantity:
    """A measure of the gate: its number in the summary, and how it is written."""

    name: str
    title: str
    n: str
    """Template of how many it was measured on."""
    neutral: float
    """No difference between candidate and incumbent."""
    spec: str
    axis: str
    rule: str
    """Of the gate, whose bound is drawn."""
    is_gain: bool = True


_QUANTITIES = (
    _Quantity(
        "win_rate", "Win rate against the incumbent", "{num_judged_prompts:,} prompts", 0.5, ".1%", "%", "win_rate"
    ),
    _Quantity(
        "length_controlled_win_rate",
        "Win rate at equal length",
        "{num_judged_prompts:,} prompts",
        0.5,
        ".1%",
        "%",
        "length_controlled_win_rate",
    ),
    _Quantity(
        "heldout_reward_accuracy_change",
        "Change of implicit-reward accuracy against the incumbent",
        "{num_held_out_pairs:,} held-out pairs",
        0.0,
        "+.1pt",
        "percentage points",
        "accuracy_gain",
    ),
    _Quantity(
        "response_characters_growth",
        "Growth of the answers' length",
        "{num_sample_prompts:,} prompts",
        0.0,
        "+.1%",
        "% of the incumbent's length",
        "length_growth",
        is_gain=False,
    ),
)


@dataclass(frozen=True)
class ForestRow:
    """An iteration in a plot."""

    name: str
    cell: Cell
    n: Cell
    drawing: str
    side: str
    """above or below the line of no difference, or unclear where the interval holds it."""


@dataclass(frozen=True)
class ForestPlot:
    """A quantity with a row an iteration."""

    title: str
    bound: Cell
    """The gate's line, in words; no text where the gate has none."""
    rows: tuple[ForestRow, ...]
    axis: str
    is_gain: bool
    """Whether more of it is better."""


def forest_plots(summary: Summary) -> list[ForestPlot]:
    """Return a plot for each quantity that was measured."""
    return [plot for quantity in _QUANTITIES if (plot := _plot(summary, quantity))]


def _plot(summary: Summary, quantity: _Quantity) -> ForestPlot | None:
    measured = [(i, one) for i, one in enumerate(summary["iterations"]) if one.get(quantity.name) is not None]
    if not measured:
        return None
    last, latest = measured[-1]
    found = next((i for i, rule in enumerate(latest["gate"]["rules"]) if rule["name"] == quantity.rule), None)
    rule = latest["gate"]["rules"][found] if found is not None else {}
    bound = rule.get("bound")
    lines = {"neutral": quantity.neutral} | ({"bound": bound} if bound not in (None, quantity.neutral) else {})
    ends = [value for _, one in measured for value in _interval(one, quantity) if math.isfinite(value)]
    axis = Axis(quantity.axis, [*ends, *lines.values()])
    words = fill(rule, f"iterations[{last}].gate.rules[{found}]", (f"{{bound:{quantity.spec}}}",)) if rule else ()
    rows = tuple(_row(i, one, quantity, axis, lines) for i, one in measured)
    return ForestPlot(quantity.title, words, rows, axis_chart(axis, lines, scale=100), quantity.is_gain)


def _interval(one: Summary, quantity: _Quantity) -> tuple[float, float, float]:
    """Return value, low and high; infinite where an end is not known."""
    value = float(one[quantity.name])
    low, high = one.get(f"{quantity.name}_low"), one.get(f"{quantity.name}_high")
    return value, -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _row(index: int, one: Summary, quantity: _Quantity, axis: Axis, lines: Mapping[str, float]) -> ForestRow:
    value, low, high = _interval(one, quantity)
    name, spec, path = quantity.name, quantity.spec, f"iterations[{index}]"
    cell = fill(
        one, path, (f"{{{name}:{spec}}} ({{{name}_low:{spec}}} to {{{name}_high:{spec}}})", f"{{{name}:{spec}}}")
    )
    side = "above" if low > quantity.neutral else "below" if high < quantity.neutral else "unclear"
    drawing = interval_chart(f"{quantity.title}, {one['name']}", value, low, high, axis, lines)
    return ForestRow(str(one["name"]), cell, fill(one, path, (quantity.n,)), drawing, side)

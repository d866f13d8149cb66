"""The charts of iterations: rewards, lengths and length penalty of responses, and the curves of training. Pure.

Curves and histograms are drawn from metrics.jsonl and from the tables; what is written beside them is the summary's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dice_core.report.charts import Axis, Line, Rule, histogram_chart, line_chart
from dice_core.report.run_data import IterationData

Summary = Mapping[str, Any]
Chart = tuple[str, str]
"""Title and drawing."""

_REWARDS = {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "policy"}
_FAR_OUT = 3.0
"""Quartile ranges beyond the quartiles from which a value counts as far out (Tukey)."""


def response_charts(iteration: IterationData, numbers: Summary) -> list[Chart]:
    """Return the charts of an iteration's responses.

    Args:
        iteration: as it was read.
        numbers: its summary.
    """
    charts = []
    if iteration.rewards:
        x = Axis("implicit reward, without beta (nats)")
        charts.append(("Implicit reward", _histogram("implicit reward", x, iteration.rewards)))
    if iteration.lengths:
        x = Axis("length of the response (characters)")
        charts.append(("Length", _histogram("length", x, iteration.lengths)))
    if iteration.gap_curve:
        unit, mark = numbers["length_unit"], (numbers["length_penalty"], numbers["length_gap"])
        chart = line_chart(
            "mean length gap against length penalty",
            Axis(f"length penalty alpha (nats per {unit})"),
            Axis(f"mean gap, chosen minus rejected ({unit}s)", (0.0,)),
            [Line("policy", iteration.gap_curve)],
            rules=[Rule(0.0, "equal lengths")],
            marks=[] if None in mark else [mark],
        )
        charts.append(("Length gap against length penalty", chart))
    return charts


def _histogram(title: str, x: Axis, values: Any) -> str:
    return histogram_chart(title, x, values, filled="all", outlined=["rejected", "chosen"])


def training_charts(iterations: Sequence[IterationData], summaries: Sequence[Summary]) -> list[tuple[str, list[Chart]]]:
    """Return name and curves of each iteration that was trained; a quantity has one range over all, so they compare.

    Args:
        iterations: as they were read.
        summaries: of the same iterations.
    """
    trained = [(one, numbers) for one, numbers in zip(iterations, summaries, strict=True) if one.training]
    lines = [one.training for one, _ in trained]
    rings = [(True, value) for _, numbers in trained for _, value in _measured(numbers, "loss")]
    loss = usual_range([found for one in lines for found in _values(one, ["loss"])] + rings)
    rewards = usual_range([found for one in lines for found in _values(one, _REWARDS)])
    return [(numbers["name"], _curves_of(one.training, numbers, loss, rewards)) for one, numbers in trained]


def _curves_of(
    lines: Sequence[Summary], numbers: Summary, loss: tuple[float, float] | None, rewards: tuple[float, float] | None
) -> list[Chart]:
    step, expected = Axis("step", is_whole=True), numbers["step0_loss_expected"]
    rule = [] if expected is None else [Rule(expected, "start, by theory")]
    charts = [
        (
            "DPO loss",
            line_chart(
                "loss",
                step,
                Axis("loss (nats)", loss or (), ends=loss),
                _curves(lines, {"loss": "policy"}),
                rules=rule,
                marks=_measured(numbers, "loss"),
            ),
        ),
        (
            "Rewards",
            line_chart(
                "rewards", step, Axis("reward, with beta (nats)", rewards or (), ends=rewards), _curves(lines, _REWARDS)
            ),
        ),
        (
            "Reward accuracy",
            line_chart(
                "accuracy",
                step,
                Axis("pairs (%)", (0.0, 100.0)),
                _curves(lines, {"rewards/accuracies": "policy"}, scale=100),
                rules=[Rule(50.0, "chance")],
                marks=_measured(numbers, "reward_accuracy", scale=100),
            ),
        ),
    ]
    return [chart for chart in charts if chart[1]]


def _measured(numbers: Summary, name: str, scale: float = 1) -> list[tuple[float, float]]:
    """Return the two points of the table's row: the same training pairs, before the first step and after the last."""
    found = [(0, numbers[f"first_{name}"]), (numbers["num_steps"], numbers[f"last_{name}"])]
    return [(step, scale * value) for step, value in found if step is not None and value is not None]


def usual_range(series: Sequence[tuple[bool, float]]) -> tuple[float, float] | None:
    """Return the range of values that are not far out, or None where there are none.

    Args:
        series: whether a value always counts, and the value. Those on pairs kept aside do: they are means of many
            pairs, and a batch of training is a few.
    """
    values = np.array([value for _, value in series])
    if not values.size:
        return None
    low, high = np.quantile(values, [0.25, 0.75])
    reach = _FAR_OUT * (high - low)
    kept = [value for counts, value in series if counts or low - reach <= value <= high + reach]
    return float(min(kept)), float(max(kept))


def _values(lines: Sequence[Summary], names: Sequence[str] | Mapping[str, str]) -> list[tuple[bool, float]]:
    return [
        (bool(prefix), y) for name in names for prefix in ("", "eval_") for _, y in points(lines, f"{prefix}{name}")
    ]


def _curves(lines: Sequence[Summary], styles: Mapping[str, str], scale: float = 1) -> list[Line]:
    """Return a quantity on training pairs, plain, and on evaluation pairs, with markers."""
    found = []
    for key, style in styles.items():
        found.append(Line(f"{style} train", points(lines, key, scale)))
        found.append(Line(f"{style} eval", points(lines, f"eval_{key}", scale), has_markers=True))
    return found


def points(lines: Sequence[Summary], key: str, scale: float = 1) -> list[tuple[float, float]]:
    """Return (step, value) of a quantity in the lines of metrics.jsonl that have it."""
    return [(line["step"], scale * line[key]) for line in lines if line.get(key) is not None and "step" in line]

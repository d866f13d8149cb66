"""Several runs on one page: their final numbers and verdicts, the settings that differ, and their curves together.

Pure. Its numbers are those of the comparison's own summary.json, under their names, as on the page of a run (page.py).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dice_core.report.charts import Axis, Line, Rule, line_chart
from dice_core.report.numbers import Number
from dice_core.report.page import render
from dice_core.report.panels import points
from dice_core.report.run_data import RunData
from dice_core.report.table import Column, Row, overview, rows_of

MOST_RUNS = 6
"""As many lines as can be told apart in a chart."""

_SOURCES = ("preset", "policy_source", "reference_source", "preferences_source", "prompts_source", "package_version")
_TOTALS = (
    ("verdict", "{verdict.outcome}"),
    ("about iteration", "{verdict.iteration}"),
    ("time of all stages", "{resources.seconds:time}"),
    ("GPU hours", "{resources.gpu_hours:,.2f}"),
    ("cost", "{resources.cost:,.2f}"),
    ("peak memory of training", "{resources.peak_memory_bytes:GiB}"),
)

Summary = Mapping[str, Any]


def compare(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return the numbers of a comparison as plain JSON types.

    Args:
        summaries: of the runs, see summary.py.

    Returns:
        `runs`, each with the numbers of its `final` iteration (that of the verdict, or the last), and
        `settings_that_differ`: a list of {name, values}, a value a run.
    """
    kept = ("run", "run_uri", *_SOURCES, "written", "verdict", "resources", "iterations")
    settings = [_settings(summary) for summary in summaries]
    names = sorted({name for found in settings for name in found})
    differing = [(name, [found.get(name) for found in settings]) for name in names]
    return {
        "runs": [{key: one[key] for key in kept} | {"final": _final(one)} for one in summaries],
        "settings_that_differ": [
            {"name": name, "values": values} for name, values in differing if any(v != values[0] for v in values)
        ],
    }


def _final(summary: Summary) -> Any:
    number = summary["verdict"]["iteration"]
    decided = [one for one in summary["iterations"] if one["iteration"] == number and number is not None]
    return (decided or summary["iterations"])[-1]


def _settings(summary: Summary) -> dict[str, str]:
    """Return everything that was chosen for a run, flat, as text."""
    found = {name: summary[name] for name in _SOURCES}
    for section, values in summary["settings"].items():
        nested = values if isinstance(values, Mapping) else {"": values}
        found |= {f"{section}.{name}".rstrip("."): value for name, value in nested.items()}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in found.items()
        if value is not None
    }


def build_comparison(runs: Sequence[RunData], comparison: Summary) -> str:
    """Return the page.

    Args:
        runs: as they were read.
        comparison: of `compare`, of the same runs.
    """
    names = run_names(comparison)
    columns = [
        Column(name, f"runs[{i}].final", one["final"])
        for i, (name, one) in enumerate(zip(names, comparison["runs"], strict=True))
    ]
    whole = [
        Column(name, f"runs[{i}]", one) for i, (name, one) in enumerate(zip(names, comparison["runs"], strict=True))
    ]
    return render(
        "comparison.html.jinja",
        names=names,
        runs=comparison["runs"],
        totals=rows_of(whole, _TOTALS),
        rows=overview(columns),
        settings=_setting_rows(comparison),
        charts=_charts(runs, comparison),
    )


def run_names(comparison: Summary) -> list[str]:
    """Return the runs' names; their addresses where two have one name."""
    names = [str(one["run"]) for one in comparison["runs"]]
    return names if len(set(names)) == len(names) else [str(one["run_uri"]) for one in comparison["runs"]]


def _setting_rows(comparison: Summary) -> list[Row]:
    return [
        Row(
            "",
            (str(entry["name"]),),
            (f"settings_that_differ[{i}].values",),
            tuple(
                ("-",) if value is None else (Number(f"settings_that_differ[{i}].values[{j}]", value, str(value)),)
                for j, value in enumerate(entry["values"])
            ),
        )
        for i, entry in enumerate(comparison["settings_that_differ"])
    ]


def _charts(runs: Sequence[RunData], comparison: Summary) -> list[tuple[str, str]]:
    """Return the curves of all runs over each other: measures by iteration, then training of the final iteration."""
    by_iteration = (
        ("Win rate by iteration", "win_rate", "against its incumbent (%)", Rule(50.0, "no difference")),
        (
            "Implicit-reward accuracy by iteration",
            "heldout_reward_accuracy",
            "held-out pairs (%)",
            Rule(50.0, "chance"),
        ),
    )
    charts = []
    for title, field, label, rule in by_iteration:
        lines = [
            Line(f"run{i}", _by_iteration(one, field), has_markers=True) for i, one in enumerate(comparison["runs"])
        ]
        charts.append((title, line_chart(title, Axis("iteration", is_whole=True), Axis(label), lines, rules=[rule])))
    finals = [one["final"]["iteration"] for one in comparison["runs"]]
    training = [
        next((one.training for one in run.iterations if one.number == final), ())
        for run, final in zip(runs, finals, strict=True)
    ]
    for title, field, label in (
        ("DPO loss on pairs kept aside", "eval_loss", "loss (nats)"),
        ("Reward margin on pairs kept aside", "eval_rewards/margins", "margin, with beta (nats)"),
    ):
        lines = [Line(f"run{i}", points(found, field), has_markers=True) for i, found in enumerate(training)]
        charts.append((title, line_chart(title, Axis("step", is_whole=True), Axis(label), lines)))
    return [chart for chart in charts if chart[1]]


def _by_iteration(run: Summary, field: str) -> list[tuple[float, float]]:
    return [(one["iteration"], 100 * one[field]) for one in run["iterations"] if one.get(field) is not None]

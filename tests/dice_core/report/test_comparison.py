"""Several runs on one page."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dice_core.report.comparison import build_comparison, compare, run_names
from dice_core.report.run_data import RunData
from dice_core.report.summary import summary
from tests.dice_core.report.test_page import Page, at
from tests.synthetic_run import PLAN, iteration, policy_of, run_data

SLOWER = {**PLAN, "training": {"beta": 0.1, "learning_rate": 1e-7}, "seed": 7}


@pytest.fixture(scope="module")
def runs() -> list[RunData]:
    second = replace(run_data(iteration(1, "not shown", steps=90)), uri="s3://bucket/dice/runs/april", plan=SLOWER)
    return [run_data(iteration(1), iteration(2, "not shown", against=policy_of(1)), promoted=1), second]


@pytest.fixture(scope="module")
def comparison(runs: list[RunData]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(compare([summary(run) for run in runs]), allow_nan=False))
    return found


def test_each_run_is_shown_by_the_iteration_that_its_verdict_is_about(comparison: dict[str, Any]) -> None:
    assert [run["final"]["iteration"] for run in comparison["runs"]] == [1, 1]
    assert [run["verdict"]["outcome"] for run in comparison["runs"]] == ["better", "not shown"]


def test_only_settings_that_differ_are_told(comparison: dict[str, Any]) -> None:
    assert comparison["settings_that_differ"] == [
        {"name": "seed", "values": ["42", "7"]},
        {"name": "training.learning_rate", "values": ["5e-07", "1e-07"]},
    ]


def test_every_number_of_the_page_stands_in_its_summary(runs: list[RunData], comparison: dict[str, Any]) -> None:
    parsed = Page(build_comparison(runs, comparison))
    assert len(parsed.numbers) > 60
    for name, value, _ in parsed.numbers:
        found = at(comparison, name)
        assert value == (found if isinstance(found, str) else json.dumps(found)), name
    assert not parsed.tags & {"script", "link", "img"}


def test_the_page_has_a_column_and_a_curve_a_run(runs: list[RunData], comparison: dict[str, Any]) -> None:
    page = build_comparison(runs, comparison)
    text = Page(page).words
    assert text.index("march Better: iteration 1") < text.index("april Not shown to be better")
    assert "54.3% (51.3% to 57.3%)51.2% (48.2% to 54.2%)" in text
    for title in ("Win rate by iteration", "DPO loss on pairs kept aside"):
        chart = page[page.index(f"<figcaption>{title}") :].partition("</figure>")[0]
        assert "run0" in chart and "run1" in chart and "run2" not in chart


def test_runs_of_one_name_are_told_apart_by_their_addresses(runs: list[RunData]) -> None:
    other = replace(runs[1], uri="s3://other/dice/runs/march")
    assert run_names(compare([summary(runs[0]), summary(other)])) == [runs[0].uri, other.uri]

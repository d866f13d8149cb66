"""What KFP shows of a run beside others: few numbers, all finite, and a table in Markdown."""

import math
import re
from dataclasses import replace

from dice_core.report.headline import MOST_NUMBERS, headline_numbers, markdown_table
from dice_core.report.run_data import IterationData, RunData
from dice_core.report.summary import summary
from tests.synthetic_run import ROOT, iteration, policy_of, run_data, warm_start


def test_the_numbers_are_few_known_and_those_of_the_policy_that_the_verdict_is_about() -> None:
    second = iteration(2, "not shown", against=policy_of(1))
    found = headline_numbers(summary(run_data(warm_start(), iteration(1), second), gpu_hour_price=2.0))
    assert len(found) == MOST_NUMBERS
    assert found["win_rate"] == 0.543 and found["last_loss"] == 0.5124
    assert all(math.isfinite(value) for value in found.values())


def test_a_run_without_an_evaluation_has_the_numbers_that_it_has() -> None:
    one = IterationData(1, {"generate": iteration(1).stages["generate"]})
    assert headline_numbers(summary(run_data(one))) == {"seconds": 1745.0, "gpu_hours": 1742.0 * 8 / 3600}
    assert headline_numbers(summary(RunData(ROOT, ()))) == {}


def test_the_markdown_has_the_verdict_and_a_row_of_as_many_cells_for_each_quantity() -> None:
    text = markdown_table(summary(run_data(warm_start(), iteration(1))))
    lines = text.splitlines()
    assert lines[0] == "**DICE run march**" and lines[2].startswith("Better: iteration 1 against the first policy")
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {4}
    assert "| win rate on 1,024 prompts | - | 54.3% (51.3% to 57.3%) |" in table
    assert len(text) < 4000


def test_what_people_named_does_not_become_markup() -> None:
    data = replace(run_data(iteration(1)), uri="s3://bucket/dice/runs/a|b`c*d<i>")
    assert markdown_table(summary(data)).startswith(r"**DICE run a\|b\`c\*d\<i\>**")

"""A run in a few numbers and a small table, for views that hold many runs: KFP's comparison of metrics and of Markdown.

Pure. KFP's UI shows Markdown without HTML, and cuts it at 400,000 characters (frontend/src/components/viewers/
MarkdownViewer.tsx); its launcher fails a task for a metric that is null or not finite.
"""

import re
from collections.abc import Mapping
from typing import Any

from dice_core.report.numbers import look_up, text_of
from dice_core.report.table import columns_of, overview

MOST_NUMBERS = 15
"""Of a dsl.Metrics: more of them hide what counts."""

_LAST = (
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "length_controlled_win_rate",
    "length_controlled_win_rate_low",
    "heldout_reward_accuracy",
    "heldout_reward_accuracy_change",
    "heldout_reward_accuracy_change_low",
    "heldout_reward_accuracy_change_high",
    "response_characters_growth",
    "drift_per_token",
    "last_loss",
)
_RUN = ("resources.seconds", "resources.gpu_hours", "resources.cost")
_GROUPS = ("", "judged answers", "held out", "training")


def headline_numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return at most MOST_NUMBERS numbers of the policy that the verdict is about, and of the run; only known ones."""
    about = _about(summary)
    found = {name: about.get(name) for name in _LAST} | {
        name.rpartition(".")[2]: look_up(summary, name) for name in _RUN
    }
    known = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return dict(list(known.items())[:MOST_NUMBERS])


def _about(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    number = summary["verdict"]["iteration"]
    last: list[Mapping[str, Any]] = summary["iterations"][-1:]
    found = [one for one in summary["iterations"] if one["iteration"] == number] or last
    return found[0] if found else {}


def markdown_table(summary: Mapping[str, Any]) -> str:
    """Return the verdict and the rows that decide as Markdown."""
    columns = columns_of(summary)
    rows = [row for row in overview(columns) if row.group in _GROUPS]
    cells = [["", *(column.name for column in columns)], ["---"] * (len(columns) + 1)]
    cells += [[row.words, *map(text_of, row.cells)] for row in rows]
    lines = ["| " + " | ".join(map(_escaped, line)) + " |" for line in cells]
    title = f"**DICE run {_escaped(summary['run'])}**"
    return "\n".join([title, "", _escaped(summary["verdict"]["sentence"]), "", *lines, ""])


def _escaped(text: str) -> str:
    """Return a text without what Markdown would take for marks; addresses and numbers stay readable."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split()))

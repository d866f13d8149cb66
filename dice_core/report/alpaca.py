"""A run's results on AlpacaEval 2 beside those that the paper reports for the same preset. Pure."""

from typing import Any

from dice_core.evaluation.published import PUBLISHED
from dice_core.report.run_data import RunData

_MEASURED = ("length_controlled_win_rate_percent", "win_rate_percent")


def alpaca_rows(data: RunData) -> list[dict[str, Any]]:
    """Return a row for the first policy and for each iteration's; none where the run has no result at all.

    Args:
        data: of the run; its preset decides which of the paper's numbers belong to it.

    Returns:
        `name`, the numbers of `dice alpaca-scores` under their names, and `paper_` before those that the paper has too,
        in percent; None where one is not known.
    """
    measured = {one.number: one.alpaca_eval for one in data.iterations if one.alpaca_eval}
    if not measured:
        return []
    published = PUBLISHED.get(str(data.plan.get("preset")), ())
    rows = []
    for number in sorted({*measured, *range(len(published))}):
        paper = published[number]._asdict() if number < len(published) else {}
        ours = {name: value for name, value in measured.get(number, {}).items() if name != "seconds"}
        rows.append(
            {"iteration": number, "name": f"iteration {number}" if number else "first policy"}
            | {**dict.fromkeys((*_MEASURED, "annotator")), **ours}
            | {f"paper_{name}": paper.get(name.removesuffix("_percent")) for name in _MEASURED}
        )
    return rows

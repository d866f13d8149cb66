"""The report of a run: one self-contained page for people.

The page needs no network, no script and no storage of the browser, so that it works in a sandboxed frame, in a mail and
on paper. Its numbers are those of summary.json, under their names; summary.py makes them, table.py and forest.py set
them, panels.py draws curves.
"""

import json
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dice_core.report import table
from dice_core.report.answers import Prompt, disputed_prompts, followed_prompts
from dice_core.report.forest import forest_plots
from dice_core.report.numbers import NOTHING, Cell, Number, fill, is_known
from dice_core.report.panels import response_charts, training_charts
from dice_core.report.run_data import RunData, StageData
from dice_core.report.summary import FailureLine, failure_lines, name
from dice_core.report.summary import summary as summary_of

_FOLDER = Path(__file__).parent

# The page stays under 1 MB: sampled answers are what can be long.
_SAMPLES_BYTES, _BYTES_PER_CHARACTER = 260_000, 3
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 300, 6_000

_KINDS = {
    "gain": "shows that it is better: all of these must hold",
    "guard": "guards: a broken one refuses the policy",
    "evidence": "evidence: a broken one bars its promotion",
}
"""What the gate does with its rules, see evaluation/result.py."""


def build_report(data: RunData, summary: Mapping[str, Any] | None = None) -> str:
    """Return the page. All text of persons and models is escaped.

    Args:
        data: of `collect`.
        summary: of the same data; made here by default.
    """
    summary = summary or summary_of(data)
    followed, disputed = followed_prompts(data.iterations), disputed_prompts(data.iterations)
    filters, nothing_filtered = table.filters(summary)
    return render(
        "report.html.jinja",
        data=data,
        summary=summary,
        header=_header(summary),
        # The outcome stands out of its sentence.
        verdict=re.split("(?=[:.])", summary["verdict"]["sentence"], maxsplit=1),
        names=table.column_names(summary),
        failures=_failures(data),
        verdicts=[_verdict(one) for one in summary["iterations"] if one["iteration"] and not one["failures"]],
        plots=forest_plots(summary),
        rules=table.gate_rules(summary),
        kinds=_KINDS,
        judged=[one["name"] for one in summary["iterations"] if one["gate"]["rules"]],
        rows=table.overview(table.columns_of(summary)),
        filters=filters,
        nothing_filtered=nothing_filtered,
        totals=table.TOTALS,
        prepared=_prepared(summary),
        alpaca=_alpaca(summary),
        verdict_groups=_verdict_groups(summary),
        is_scored=any(one.stage("score").state == "completed" for one in data.iterations),
        panels=[
            (numbers["name"], response_charts(one, numbers), _penalty(index, numbers))
            for index, (one, numbers) in enumerate(zip(data.iterations, summary["iterations"], strict=True))
            if one.rewards
        ],
        training=training_charts(data.iterations, summary["iterations"]),
        checks=table.numerical_checks(summary),
        answers=_shown(followed, "answers", _SAMPLES_BYTES * 3 // 4),
        num_answered=_latest(summary, "{num_sample_prompts:,}"),
        disputed=_shown(disputed, "disputed", _SAMPLES_BYTES // 4),
        provenance=_provenance(data),
        summary_link=_data_link(summary),
    )


def render(template: str, **values: Any) -> str:
    """Return a template of this folder, filled in.

    Args:
        template: its file.
        values: what it shows; cells of tables become text with the names of their numbers.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"typeset": typeset, "shown": shown}
    return clean(environment.get_template(template).render(**values))


def shown(cell: Cell) -> Any:
    """Return a cell as HTML: each number as a `data` element with its value, and its name in the summary as title."""
    from markupsafe import Markup

    parts = [Markup("{}").format(typeset(part)) if isinstance(part, str) else _data_element(part) for part in cell]
    return Markup("").join(parts)


def _data_element(number: Number) -> Any:
    from markupsafe import Markup

    value = number.value if isinstance(number.value, str) else json.dumps(number.value)
    return Markup('<data value="{}" title="{}">{}</data>').format(value, number.name, typeset(number.text))


def typeset(text: str) -> str:
    """Return a table's ASCII with arrows, plus-minus and minus signs."""
    text = re.sub(r"(?<=\d) %", "%", text.replace("->", "\u2192").replace("+/-", "\u00b1"))
    return "\u2013" if text == NOTHING else re.sub(r"(?<![\w.-])-(?=[\d.])|(?<=\de)-(?=\d)", "\u2212", text)


def clean(text: str) -> str:
    """Return a text without what a page cannot hold: control characters and halves of surrogate pairs."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", text.replace("\r\n", "\n"))


def _header(summary: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """Return what a person asks of a run first: which model, which data, how long, how much."""
    lines = (
        ("preset", "{preset}"),
        ("first policy", "{policy_source}"),
        ("first reference", "{reference_source}"),
        ("pairs", "{preferences_source}"),
        ("prompts", "{prompts_source}"),
        ("time of all stages", "{resources.seconds:time}"),
        ("GPU hours", "{resources.gpu_hours:,.2f}"),
        ("cost", "{resources.cost:,.2f} at {resources.gpu_hour_price:,.2f} a GPU hour"),
        ("peak memory of training", "{resources.peak_memory_bytes:GiB}"),
    )
    cells = [(label, fill(summary, "", (template,))) for label, template in lines]
    return [(label, cell) for label, cell in cells if cell != (NOTHING,)]


def _failures(data: RunData) -> list[FailureLine]:
    """Return why stages failed, those of the whole run first."""
    found = failure_lines(data.failures)
    for iteration in data.iterations:
        lines = failure_lines(iteration.failures)
        found += [line._replace(task=f"{name(iteration)}: {line.task}") for line in lines]
    return found


def _verdict(numbers: Mapping[str, Any]) -> dict[str, Any]:
    status = numbers["status"]
    return {
        "name": numbers["name"],
        "status": status,
        # The status stands before the reason.
        "reason": numbers["reason"].removeprefix(f"{status}: "),
        "warnings": numbers["gate"]["warnings"],
    }


def _prepared(summary: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """Return the counts of prepare-data: what there is, then what was dropped."""
    names = sorted(summary["data"], key=lambda name: name.startswith("num_dropped"))
    return [
        (name.removeprefix("num_").replace("_", " "), fill(summary, "", (f"{{data.{name}:,}}",)))
        for name in names
        if summary["data"][name]
    ]


def _latest(summary: Mapping[str, Any], template: str) -> Cell:
    """Return a template with the numbers of the last iteration that has them."""
    cells = [fill(one, f"iterations[{i}]", (template,)) for i, one in enumerate(summary["iterations"])]
    return next((cell for cell in reversed(cells) if is_known(cell)), (NOTHING,))


def _alpaca(summary: Mapping[str, Any]) -> list[tuple[str, list[Cell]]]:
    """Return AlpacaEval's rows: length-controlled and plain win rate, then the paper's."""
    templates = (
        ("{length_controlled_win_rate_percent:.2f}",),
        ("{win_rate_percent:.2f} +/- {win_rate_percent_se:.2f}", "{win_rate_percent:.2f}"),
        ("{paper_length_controlled_win_rate_percent:.2f}",),
        ("{paper_win_rate_percent:.2f}",),
    )
    return [
        (str(row["name"]), [fill(row, f"alpaca_eval[{i}]", template) for template in templates])
        for i, row in enumerate(summary["alpaca_eval"])
    ]


class _Groups(NamedTuple):
    """Wins, ties and losses of the last iteration that was judged, by something."""

    iteration: str
    by: str
    rows: list[tuple[str, list[Cell]]]


def _verdict_groups(summary: Mapping[str, Any]) -> list[_Groups]:
    titles = {"verdicts_by_category": "category", "verdicts_by_length": "length against the incumbent's answer"}
    judged = [(i, one) for i, one in enumerate(summary["iterations"]) if one["verdicts_by_length"]]
    if not judged:
        return []
    index, last = judged[-1]
    found = [_Groups(last["name"], title, _groups(last[field], index, field)) for field, title in titles.items()]
    return [groups for groups in found if groups.rows]


def _groups(groups: Sequence[Mapping[str, Any]], index: int, field: str) -> list[tuple[str, list[Cell]]]:
    return [
        (
            str(group["group"]),
            [fill(group, f"iterations[{index}].{field}[{i}]", (f"{{{word}:,}}",)) for word in ("win", "tie", "loss")],
        )
        for i, group in enumerate(groups)
    ]


def _penalty(index: int, numbers: Mapping[str, Any]) -> Cell:
    """Return what the length penalty is and does, in a sentence; empty where there is none."""
    unit = numbers["length_unit"]
    templates = (
        f"Chosen (ring): a length penalty of {{length_penalty:.4g}} nats per {unit}, "
        f"{{length_penalty_paper:.3g}} on the paper's scale. It turns a mean gap of {{length_gap_unpenalised:+.1f}} "
        f"{unit}s into {{length_gap:+.1f}}.",
        f"Chosen (ring): a length penalty of {{length_penalty:.4g}} nats per {unit}.",
    )
    found = fill(numbers, f"iterations[{index}]", templates)
    return () if found == (NOTHING,) else found


def _shown(prompts: Sequence[Prompt], path: str, budget: int) -> list[dict[str, Any]]:
    """Return the prompts that the page has room for, with the texts shortened and the numbers by name."""
    found: list[dict[str, Any]] = []
    num_texts = sum(1 + len(prompt["answers"]) for prompt in prompts) or 1
    most = max(_FEWEST_CHARACTERS, min(_MOST_CHARACTERS, budget // (_BYTES_PER_CHARACTER * num_texts)))
    for i, prompt in enumerate(prompts):
        answers = [
            {**_shorten(answer["text"], most), "policy": answer["policy"], "is_cut": answer["is_cut"]}
            | {"facts": _facts(answer, f"{path}[{i}].answers[{j}]")}
            for j, answer in enumerate(prompt["answers"])
        ]
        question = _shorten(prompt["prompt"], most)
        budget -= sum(_page_bytes(str(part["text"])) for part in (question, *answers))
        if budget < 0:
            break
        found.append({"prompt": question, "answers": answers})
    return found


def _facts(answer: Mapping[str, Any], path: str) -> list[Cell]:
    templates = (
        "{num_characters:,} characters",
        "implicit reward {reward:+.2f} nats",
        "judge prefers it by {preference:.0%}",
        "shown first {candidate_first:.0%}, shown second {candidate_second:.0%}",
    )
    cells = [fill(answer, path, (template,)) for template in templates]
    return [cell for cell in cells if cell != (NOTHING,)]


def _shorten(text: str, most: int) -> dict[str, Any]:
    return {"text": text[:most], "is_shortened": len(text) > most}


def _page_bytes(text: str) -> int:
    from markupsafe import escape

    return len(str(escape(text)).encode())


def _data_link(summary: Mapping[str, Any]) -> str:
    return "data:application/json;base64," + b64encode(json.dumps(summary, separators=(",", ":")).encode()).decode()


def _provenance(data: RunData) -> list[dict[str, Any]]:
    """Return the stages of each iteration, and its settings where no earlier iteration has the same."""
    places = [("data", {"prepare-data": data.data})]
    places += [(name(iteration), iteration.stages) for iteration in data.iterations]
    seen: dict[str, str] = {}
    found = []
    for place, stages in places:
        settings = []
        for section, values in _sections(stages.values()):
            text = json.dumps(values, indent=1, sort_keys=True)
            earlier = seen.setdefault(f"{section} {text}", place)
            settings.append((section, "" if earlier != place else text, earlier))
        found.append({"name": place, "stages": stages, "settings": settings})
    return found


def _sections(stages: Iterable[StageData]) -> list[tuple[str, Any]]:
    """Return the settings of some stages by section, each once, and the seed they share."""
    merged: dict[str, Any] = {}
    for stage in stages:
        merged |= {name: values for name, values in stage.settings.items() if isinstance(values, dict)}
        if "seed" in stage.settings:
            merged["seed"] = stage.settings["seed"]
    return list(merged.items())

"""The report of a run: one self-contained page for people.

The page needs no network, no script and no storage of the browser, so that it works in a sandboxed frame, in a mail and
on paper. run_data.py collects what it shows, summary.py its numbers, charts.py draws.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dice_core.report import summary as run_summary
from dice_core.report.charts import Axis, Line, Rule, histogram_chart, line_chart
from dice_core.report.run_data import IterationData, RunData, StageData

_TEMPLATE = Path(__file__).with_name("report.html.jinja")

# The page stays under 1 MB: sampled answers are what can be long.
_SAMPLES_BYTES, _TEXT_CHARACTERS = 400_000, 6_000

_REASONS = {
    "length_limit": "ended by the token limit",
    "empty": "empty",
    "too_short": "too short",
    "too_long": "too long",
    "few_valid_responses": "its prompt has too few valid responses",
    "non_finite": "a log-prob is not a finite number",
    "few_finite_responses": "its prompt has too few responses with finite log-probs",
}


def build_report(data: RunData) -> str:
    """Return the page. All text of persons and models is escaped.

    Args:
        data: of `collect`.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["typeset"] = typeset
    template = environment.from_string(_TEMPLATE.read_text())
    budget = _SAMPLES_BYTES // max(len(data.iterations), 1)
    page = template.render(
        data=data,
        run=data.uri.rstrip("/").rpartition("/")[2],
        names=run_summary.column_names(data),
        failures=_failures(data),
        verdicts=[_verdict(iteration) for iteration in data.iterations if iteration.number and not iteration.failures],
        rows=run_summary.rows(data),
        filters=_filters(data),
        prepared=_prepared(data),
        is_scored=any(iteration.stage("score").state == "completed" for iteration in data.iterations),
        panels=[_response_panel(iteration) for iteration in data.iterations if iteration.rewards],
        training=_training_panels(data),
        checks=_numerical_checks(data),
        samples=[_samples(iteration, budget) for iteration in data.iterations if iteration.evaluation],
        provenance=_provenance(data),
    )
    return clean(page)


def typeset(text: str) -> str:
    """Return a table's ASCII with arrows, plus-minus and minus signs."""
    text = text.replace("->", "\u2192").replace("+/-", "\u00b1")
    return "\u2013" if text == run_summary.NOTHING else re.sub(r"(?<![\w.-])-(?=[\d.])|(?<=\de)-(?=\d)", "\u2212", text)


def clean(text: str) -> str:
    """Return a text without what a page cannot hold: control characters and halves of surrogate pairs."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", text.replace("\r\n", "\n"))


def _failures(data: RunData) -> list[run_summary.FailureLine]:
    """Return why stages failed, those of the whole run first."""
    found = run_summary.failure_lines(data.failures)
    for iteration in data.iterations:
        name = run_summary.name(iteration)
        lines = run_summary.failure_lines(iteration.failures)
        found += [line._replace(task=f"{name}: {line.task}") for line in lines]
    return found


def _verdict(iteration: IterationData) -> dict[str, Any]:
    gate = (iteration.evaluation or {}).get("gate", {})
    status = run_summary.status(iteration)
    return {
        "name": run_summary.name(iteration),
        "status": status,
        # The status stands before the reason.
        "reason": run_summary.summarise(iteration)["reason"].removeprefix(f"{status}: "),
        "warnings": gate.get("warnings", ()),
    }


def _filters(data: RunData) -> list[tuple[str, list[Any]]]:
    """Return the way from responses generated to pairs trained on, a row a reason, a column an iteration."""
    dropped = [run_summary.dropped(iteration) for iteration in data.iterations]
    reasons = dict.fromkeys(reason for counts in dropped for reason in counts)

    def row(label: str, stage: str, metric: str) -> tuple[str, list[Any]]:
        return label, [iteration.stage(stage).metrics.get(metric) for iteration in data.iterations]

    table = [
        row("responses generated", "generate", "num_responses"),
        *(
            (f"dropped: {_REASONS.get(reason, reason.replace('_', ' '))}", [counts.get(reason) for counts in dropped])
            for reason in reasons
        ),
        row("responses scored", "score", "num_scored"),
        row("repeated texts among the generated", "generate", "num_duplicate_responses"),
        row("scores left out: not a finite number", "pair", "num_non_finite_scores"),
        row("prompts left out: too few scored responses", "pair", "num_few_responses_prompts"),
        row("prompts left out: best and worst are one response", "pair", "num_tied_prompts"),
        row("pairs left out: both responses the same", "pair", "num_identical_pairs"),
        row("generated pairs that the replay ratio has no room for", "pair", "num_unused_generated_pairs"),
        row("offline pairs left out: both answers the same", "pair", "num_identical_offline_pairs"),
        row("offline pairs that were too few for the replay ratio", "pair", "num_missing_replayed_pairs"),
        row("pairs to train on", "pair", "num_train_pairs"),
        row("pairs to watch the loss on", "pair", "num_eval_pairs"),
        row("pairs dropped: longer than training.max_length", "train", "num_dropped_pairs"),
    ]
    return [(label, cells) for label, cells in table if any(cell is not None for cell in cells)]


def _prepared(data: RunData) -> list[tuple[str, Any]]:
    """Return the counts of prepare-data: what there is, then what was dropped."""
    counts = [(key.removeprefix("num_"), value) for key, value in data.data.metrics.items() if key.startswith("num_")]
    return [(key.replace("_", " "), value) for key, value in sorted(counts, key=lambda c: c[0].startswith("dropped"))]


def _response_panel(iteration: IterationData) -> dict[str, Any]:
    numbers = run_summary.summarise(iteration)
    unit = iteration.stage("pair").settings.get("pairing", {}).get("length_unit", "characters")
    charts = []
    if iteration.rewards:
        x = Axis("implicit reward, without beta (nats)")
        charts.append(("Implicit reward", _histogram("implicit reward", x, iteration.rewards)))
    if iteration.lengths:
        x = Axis("length of the response (characters)")
        charts.append(("Length", _histogram("length", x, iteration.lengths)))
    if iteration.gap_curve:
        mark = (numbers["length_penalty"], numbers["length_gap"])
        chart = line_chart(
            "mean length gap against length penalty",
            Axis(f"length penalty alpha (nats per {unit.removesuffix('s')})"),
            Axis(f"mean gap, chosen minus rejected ({unit})", (0.0,)),
            [Line("policy", iteration.gap_curve)],
            rules=[Rule(0.0, "equal lengths")],
            mark=None if None in mark else mark,
        )
        charts.append(("Length gap against length penalty", chart))
    return {"name": run_summary.name(iteration), "charts": charts, "numbers": numbers, "unit": unit}


def _histogram(title: str, x: Axis, values: Any) -> str:
    return histogram_chart(title, x, values, filled="all", outlined=["rejected", "chosen"])


def _training_panels(data: RunData) -> list[dict[str, Any]]:
    """Return the curves of each iteration; a quantity has one range over all iterations, so that they compare."""
    trained = [iteration for iteration in data.iterations if iteration.training]
    keys = {"loss": ["loss"], "rewards": ["rewards/chosen", "rewards/rejected", "rewards/margins"]}
    covers = {
        name: [value for iteration in trained for key in group for value in _span(iteration.training, key)]
        for name, group in keys.items()
    }
    panels = []
    for iteration in trained:
        lines = iteration.training
        expected = expected_first_loss(iteration.stage("train").settings.get("training", {}))
        loss = _curves(lines, {"loss": "policy"})
        rewards = _curves(
            lines, {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "policy"}
        )
        accuracy = _curves(lines, {"rewards/accuracies": "policy"}, scale=100)
        rule = [] if expected is None else [Rule(expected, f"start: {expected:.4f}")]
        step = Axis("step", is_whole=True)
        charts = [
            ("DPO loss", line_chart("loss", step, Axis("loss (nats)", covers["loss"]), loss, rules=rule)),
            ("Rewards", line_chart("rewards", step, Axis("reward, with beta (nats)", covers["rewards"]), rewards)),
            (
                "Reward accuracy",
                line_chart("accuracy", step, Axis("pairs (%)", (0.0, 100.0)), accuracy, rules=[Rule(50.0, "chance")]),
            ),
        ]
        panels.append({"name": run_summary.name(iteration), "charts": [chart for chart in charts if chart[1]]})
    return panels


def expected_first_loss(training: Mapping[str, Any]) -> float | None:
    """Return the loss where policy and reference are one model, or None where it depends on the data.

    Args:
        training: TrainingConfig as a dict.
    """
    if training.get("sft_weight") or training.get("reference") == "base":
        return None
    beta = training.get("beta", 0.1)
    return {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * beta**2)}.get(training.get("loss", "sigmoid"))


def _curves(lines: Sequence[Mapping[str, Any]], styles: Mapping[str, str], scale: float = 1) -> list[Line]:
    """Return a quantity on training pairs, plain, and on evaluation pairs, with markers."""
    found = []
    for key, style in styles.items():
        found.append(Line(f"{style} train", _points(lines, key, scale)))
        found.append(Line(f"{style} eval", _points(lines, f"eval_{key}", scale), has_markers=True))
    return found


def _points(lines: Sequence[Mapping[str, Any]], key: str, scale: float = 1) -> list[tuple[float, float]]:
    return [(line["step"], scale * line[key]) for line in lines if line.get(key) is not None and "step" in line]


def _span(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    values = [y for name in (key, f"eval_{key}") for _, y in _points(lines, name)]
    return [min(values), max(values)] if values else []


def _numerical_checks(data: RunData) -> list[tuple[str, list[str]]]:
    """Return what says whether the numbers of training can be trusted, a row a quantity, a column an iteration."""
    numbers = [run_summary.summarise(iteration) for iteration in data.iterations]
    settings = [iteration.stage("train").settings.get("training", {}) for iteration in data.iterations]
    expected = [expected_first_loss(training) for training in settings]
    step0 = [summary["step0_loss"] for summary in numbers]
    differences = [None if s is None or e is None else s - e for s, e in zip(step0, expected, strict=True)]
    scored = [iteration.stage("score").metrics for iteration in data.iterations]
    # Where another reward ranks the responses, reward_std is in units of its own.
    spread = [metrics.get("implicit_reward_std", metrics.get("reward_std")) for metrics in scored]
    table = [
        ("loss at step 0", step0, ".6f"),
        ("what it is with exact reference log-probs", expected, ".6f"),
        ("difference", differences, "+.1e"),
        ("reference noise, nats", [summary["reference_noise_rms"] for summary in numbers], ".4f"),
        ("spread of the rewards, nats", spread, ".3f"),
        ("change of the weights", [summary["relative_update"] for summary in numbers], ".2e"),
        ("of it lost to rounding when saved", [summary["update_rounding_loss"] for summary in numbers], ".1%"),
    ]
    return [
        (label, [run_summary.NOTHING if value is None else f"{value:{spec}}" for value in values])
        for label, values, spec in table
    ]


def _samples(iteration: IterationData, budget: int) -> dict[str, Any]:
    """Return the samples to show: so many as the settings say and the page can hold."""
    evaluation = iteration.evaluation or {}
    everything = evaluation.get("samples", [])
    wanted = iteration.stage("evaluate").settings.get("evaluation", {}).get("num_shown_samples", len(everything))
    shown: list[dict[str, Any]] = []
    for sample in everything[:wanted]:
        entry = {"prompt": _shorten(sample["prompt"])}
        for side in ("previous", "policy"):
            # Until version 0.1 the previous policy was compared with.
            answer = sample.get(side, sample.get("incumbent"))
            text = answer["text"]
            entry[side] = {**_shorten(text), "num_characters": len(text), "is_cut": answer["is_cut"]}
        budget -= sum(_page_bytes(part["text"]) for part in entry.values())
        if budget < 0:
            break
        shown.append(entry)
    return {"name": run_summary.name(iteration), "shown": shown, "num_samples": len(everything)}


def _shorten(text: str) -> dict[str, Any]:
    return {"text": text[:_TEXT_CHARACTERS], "is_shortened": len(text) > _TEXT_CHARACTERS}


def _page_bytes(text: str) -> int:
    from markupsafe import escape

    return len(str(escape(text)).encode())


def _provenance(data: RunData) -> list[dict[str, Any]]:
    """Return the stages of each iteration, and its settings where no earlier iteration has the same."""
    places = [("data", {"prepare-data": data.data})]
    places += [(run_summary.name(iteration), iteration.stages) for iteration in data.iterations]
    seen: dict[str, str] = {}
    found = []
    for name, stages in places:
        settings = []
        for section, values in _sections(stages.values()):
            text = json.dumps(values, indent=1, sort_keys=True)
            earlier = seen.setdefault(f"{section} {text}", name)
            settings.append((section, "" if earlier != name else text, earlier))
        found.append({"name": name, "stages": stages, "settings": settings})
    return found


def _sections(stages: Iterable[StageData]) -> list[tuple[str, Any]]:
    """Return the settings of some stages by section, each once, and the seed they share."""
    merged: dict[str, Any] = {}
    for stage in stages:
        merged |= {name: values for name, values in stage.settings.items() if isinstance(values, dict)}
        if "seed" in stage.settings:
            merged["seed"] = stage.settings["seed"]
    return list(merged.items())

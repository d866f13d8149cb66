"""The numbers of a run that a person asks for first: one dict per iteration, and the rows of one table made from them.

Pure. page.py shows the rows, `make demo` prints them, and summary.json holds the dicts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dice_core.preferences.reward import paper_length_penalty
from dice_core.report.run_data import IterationData, RunData, StageData
from dice_core.storage.failures import StageFailure

NOTHING = "-"
"""Stands in a table where a number is not known."""
NO_GAIN = "no gain"
"""Ends the status of an iteration whose policy goes on and is not better."""
_NUM_NAMED_SHARDS = 4
FAILED = "failed"
"""Ends the status of an iteration one of whose stages left a reason."""


class FailureLine(NamedTuple):
    """Why a task failed, or shards of it."""

    task: str
    reason: str
    details: str
    """Attempt, pod, time, and whether it is final."""

    @property
    def text(self) -> str:
        """The reason, with the details."""
        return f"{self.reason} ({self.details})"


@dataclass(frozen=True)
class Row:
    """One line of the table: a cell per iteration. ASCII; page.py sets arrows and minus signs."""

    group: str
    label: str
    cells: tuple[str, ...]


def column_names(data: RunData) -> list[str]:
    """Return the names of the iterations, in order."""
    return [name(iteration) for iteration in data.iterations]


def name(iteration: IterationData) -> str:
    """Return what people call an iteration."""
    return f"iteration {iteration.number}" if iteration.number else "warm start"


def status(iteration: IterationData) -> str:
    """Return where an iteration stands: completed, accepted, no gain, refused, skipped, or what failed or goes on.

    Accepted is a policy that is better than the one before; no gain is one that goes on and is not.
    """
    stages = iteration.stages
    if iteration.failures:
        return f"{iteration.failures[0].stage} {FAILED}"
    if any(stage.state == "skipped" for stage in stages.values()):
        return "skipped"
    if all(stage.state == "missing" for stage in stages.values()):
        return "not started"
    open_stages = [stage for stage, data in stages.items() if data.state in ("missing", "partial")]
    if open_stages:
        return f"{open_stages[0]} not finished"
    if iteration.number == 0:
        return "completed"
    verdict = iteration.stage("evaluate").metrics
    if not verdict.get("accepted"):
        return "refused"
    return "accepted" if verdict.get("promotable", verdict.get("improved")) else NO_GAIN


def failure_lines(failures: Iterable[StageFailure]) -> list[FailureLine]:
    """Return what to say of failures; shards of a stage that failed for one reason are one line."""
    groups: dict[tuple[str, str], list[StageFailure]] = {}
    for failure in failures:
        task = failure.stage if failure.shard else failure.title.rpartition(": ")[2]
        groups.setdefault((task, failure.reason), []).append(failure)
    return [
        FailureLine(task + (_shards(group) if group[0].shard else ""), reason, _details(group[0]))
        for (task, reason), group in groups.items()
    ]


def _details(failure: StageFailure) -> str:
    when = failure.time.replace("T", " ").replace("Z", " UTC")
    return ", ".join(
        filter(None, [failure.where, when, "another attempt would meet it too" if failure.is_final else ""])
    )


def _shards(failures: Sequence[StageFailure]) -> str:
    shards = [failure.shard for failure in failures if failure.shard]
    of_all = f"of {shards[0][1]}"
    if len(shards) > _NUM_NAMED_SHARDS:
        return f", {len(shards)} {of_all} shards,"
    return f" {', '.join(str(shard + 1) for shard, _ in shards)} {of_all}"


def summary(data: RunData) -> dict[str, Any]:
    """Return the whole run as plain JSON types; None where a number is not known."""
    return {
        "run_uri": data.uri,
        "package_version": data.package_version,
        "written": data.written,
        "iterations": [summarise(iteration) for iteration in data.iterations],
        "notes": list(data.notes),
        "failures": {line.task: line.text for line in failure_lines(data.failures)},
    }


def summarise(iteration: IterationData) -> dict[str, Any]:
    """Return the numbers of one iteration, flat but for `seconds` and `dropped`; None where one is not known."""
    names = ("generate", "score", "pair", "train", "evaluate")
    generate, score, pair, train, evaluate = (iteration.stage(name).metrics for name in names)
    beta = iteration.stage("train").settings.get("training", {}).get("beta")
    penalty = pair.get("length_penalty")
    # The paper has no other reward. Pairs of earlier versions do not say which theirs is.
    is_implicit = pair.get("reward", "implicit") == "implicit"
    paper = None if None in (penalty, beta) or not is_implicit else paper_length_penalty(float(penalty or 0), beta)
    copied = {
        "num_responses": generate,
        "num_cut_responses": generate,
        "num_duplicate_responses": generate,
        "num_scored": score,
        "num_generated_pairs": pair,
        "num_replayed_pairs": pair,
        "num_train_pairs": pair,
        "num_eval_pairs": pair,
        "length_penalty": pair,
        "length_gap": pair,
        "length_gap_unpenalised": pair,
        **{field: train for field in ("first_loss", "last_loss", "first_reward_accuracy", "last_reward_accuracy")},
        **{field: train for field in ("num_steps", "num_dropped_pairs", "step0_loss", "reference_noise_rms")},
        **{field: train for field in ("relative_update", "update_rounding_loss", "tokens_per_second")},
    }
    return {
        "iteration": iteration.number,
        "status": status(iteration),
        "failures": {line.task: line.text for line in failure_lines(iteration.failures)},
        "reason": evaluate.get("reason") or next((s.skipped for s in iteration.stages.values() if s.skipped), ""),
        **{field: metrics.get(field) for field, metrics in copied.items()},
        "length_penalty_paper": paper,
        "dropped": dropped(iteration),
        "num_filtered": sum(dropped(iteration).values()) if score else None,
        **{field: value for field, value in evaluate.items() if field not in ("seconds", "reason")},
        "seconds": {name: stage.metrics.get("seconds") for name, stage in iteration.stages.items()},
    }


def _stage_names(data: RunData) -> list[str]:
    """Return the stages in their order; the warm start has some of them."""
    return max((list(iteration.stages) for iteration in data.iterations), key=len, default=[])


def dropped(iteration: IterationData) -> dict[str, int]:
    """Return how many responses were not scored, by reason."""
    metrics = iteration.stage("score").metrics
    prefix = "num_dropped_"
    return {key.removeprefix(prefix): int(value) for key, value in metrics.items() if key.startswith(prefix)}


def rows(data: RunData) -> list[Row]:
    """Return the table of a run. A cell is "-" where the number is not known."""
    values = [summarise(iteration) for iteration in data.iterations]
    lines: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
        ("", "status", lambda s: s["status"]),
        ("responses", "generated", lambda s: _count(s["num_responses"])),
        ("responses", "filtered", _filtered),
        ("responses", "pairs (generated + replayed)", _pairs),
        ("length", "length penalty, nats per {unit}", lambda s: _number(s["length_penalty"], ".4g")),
        ("length", "length penalty, paper's scale (x beta)", lambda s: _number(s["length_penalty_paper"], ".3g")),
        (
            "length",
            "length gap without -> with penalty, {unit}s",
            lambda s: _arrow(s["length_gap_unpenalised"], s["length_gap"], "+.1f"),
        ),
        ("training", "DPO loss, start -> end", lambda s: _arrow(s["first_loss"], s["last_loss"], ".4f")),
        (
            "training",
            "reward accuracy, start -> end",
            lambda s: _arrow(s["first_reward_accuracy"], s["last_reward_accuracy"], ".1%"),
        ),
        ("held out", "reward accuracy before", lambda s: _measured(s, "heldout_reward_accuracy_previous", ".1%")),
        ("held out", "reward accuracy after", lambda s: _measured(s, "heldout_reward_accuracy", ".1%")),
        ("held out", "change, points", lambda s: _measured(s, "heldout_reward_accuracy_change", "+.1f", 100)),
        (
            "held out",
            "reward margin before -> after, nats",
            lambda s: _arrow(s.get("heldout_reward_margin_previous"), s.get("heldout_reward_margin"), "+.2f"),
        ),
        ("held out", "accuracy of the next reward", lambda s: _measured(s, "heldout_step_accuracy", ".1%")),
        ("held out", "answer before, characters", lambda s: _measured(s, "mean_response_characters_previous", ",.0f")),
        ("held out", "answer after, characters", lambda s: _measured(s, "mean_response_characters", ",.0f")),
        ("held out", "growth in length", lambda s: _measured(s, "response_characters_growth", "+.1%")),
        *(("time", stage, lambda s, stage=stage: _seconds(s["seconds"].get(stage))) for stage in _stage_names(data)),
        ("time", "all stages", lambda s: _seconds(sum(v for v in s["seconds"].values() if v) or None)),
    ]
    unit = _length_unit(data)
    return [
        Row(group, label.replace("{unit}", unit), tuple(cell(value) for value in values))
        for group, label, cell in lines
    ]


def summary_table(data: RunData) -> str:
    """Return the table as plain text, for a terminal."""
    header = ("", *column_names(data))
    body = [(f"{row.group}: {row.label}" if row.group else row.label, *row.cells) for row in rows(data)]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    rule = tuple("-" * width for width in widths)
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in [header, rule, *body]
    ]
    for iteration in data.iterations:
        reason = summarise(iteration)["reason"]
        state = status(iteration)
        if state in (NO_GAIN, "refused", "skipped"):
            lines.append(f"{name(iteration)} {state}: {reason.removeprefix(f'{state}: ')}")
        lines += [f"{name(iteration)}: {line.task} {FAILED}: {line.text}" for line in failure_lines(iteration.failures)]
    lines += [f"{line.task} {FAILED}: {line.text}" for line in failure_lines(data.failures)]
    return "\n".join(line.rstrip() for line in lines)


def _length_unit(data: RunData) -> str:
    stages: list[StageData] = [iteration.stage("pair") for iteration in data.iterations]
    units = (stage.settings.get("pairing", {}).get("length_unit", "characters") for stage in stages)
    return str(next(units, "characters")).removesuffix("s")


def _count(value: Any) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _number(value: Any, spec: str) -> str:
    return NOTHING if value is None else f"{value:{spec}}"


def _arrow(start: Any, end: Any, spec: str) -> str:
    return NOTHING if start is None or end is None else f"{start:{spec}} -> {end:{spec}}"


def _filtered(values: dict[str, Any]) -> str:
    num, generated = values["num_filtered"], values["num_responses"]
    if num is None:
        return NOTHING
    return f"{num:,} ({num / generated:.1%})" if generated else f"{num:,}"


def _pairs(values: dict[str, Any]) -> str:
    generated, replayed = values["num_generated_pairs"], values["num_replayed_pairs"]
    return NOTHING if generated is None or replayed is None else f"{generated:,} + {replayed:,}"


def _measured(values: dict[str, Any], field: str, spec: str, scale: float = 1) -> str:
    """Return `value +/- standard error`; the error has no sign of its own."""
    value, error = values.get(field), values.get(f"{field}_se")
    if value is None:
        return NOTHING
    text = f"{scale * value:{spec}}"
    return text if error is None else f"{text} +/- {scale * error:{spec.lstrip('+')}}"


def _seconds(value: Any) -> str:
    if value is None:
        return NOTHING
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {seconds:02d} s"
    return f"{value:.1f} s"

"""The tables of a run, made from its summary alone: a row a quantity, a cell an iteration. Pure.

Each row carries the names of its numbers in summary.json. page.py sets the rows as HTML, `make demo` prints them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dice_core.report.numbers import NOTHING, Cell, Number, fields_of, fill, is_known, look_up, text_of

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of a table: a cell per iteration."""

    group: str
    label: Cell
    names: tuple[str, ...]
    """In each iteration of summary.json, of the numbers shown."""
    cells: tuple[Cell, ...]

    @property
    def words(self) -> str:
        """The label as plain text."""
        return text_of(self.label)

    @property
    def short_names(self) -> str:
        """The names in one line: the ends of an interval by their suffix."""
        return ", ".join(
            next((name.removeprefix(base) for base in self.names[:i] if name.startswith(f"{base}_")), name)
            for i, name in enumerate(self.names)
        )

    @property
    def is_known(self) -> bool:
        """Whether any cell says anything."""
        return any(map(is_known, self.cells))

    @property
    def is_zero(self) -> bool:
        """Whether no cell says anything but 0."""
        return not any(isinstance(part, Number) and part.value for cell in self.cells for part in cell)


_PAIRS = "{num_held_out_pairs:,} held-out pairs"


def _measured(name: str, spec: str) -> tuple[str, ...]:
    """Return templates of a number with its 95 % interval, or its standard error, or alone."""
    return (
        f"{{{name}:{spec}}} ({{{name}_low:{spec}}} to {{{name}_high:{spec}}})",
        f"{{{name}:{spec}}} +/- {{{name}_se:{spec.lstrip('+')}}}",
        f"{{{name}:{spec}}}",
    )


_LINES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("", ("status",), ("{status}",)),
    (
        "judged answers",
        ("win rate on {num_judged_prompts:,} prompts", "win rate"),
        _measured("win_rate", ".1%"),
    ),
    ("judged answers", ("win rate at equal length",), _measured("length_controlled_win_rate", ".1%")),
    ("judged answers", ("wins, ties, losses",), ("{num_wins:,}, {num_ties:,}, {num_losses:,}",)),
    ("judged answers", ("verdicts that change with the order",), ("{flip_rate:.1%}",)),
    ("judged answers", ("verdicts that are missing",), ("{num_missing_verdicts:,}",)),
    (
        "judged answers",
        ("judge and implicit reward prefer the same answer",),
        _measured("reward_judge_agreement", ".1%"),
    ),
    (
        "held out",
        (f"implicit-reward accuracy on {_PAIRS}", "implicit-reward accuracy"),
        _measured("heldout_reward_accuracy", ".1%"),
    ),
    (
        "held out",
        ("the same of the incumbent",),
        _measured("heldout_reward_accuracy_incumbent", ".1%"),
    ),
    (
        "held out",
        ("the same of the policy before",),
        _measured("heldout_reward_accuracy_previous", ".1%"),
    ),
    ("held out", ("change against the incumbent, points",), _measured("heldout_reward_accuracy_change", "+.1pt")),
    (
        "held out",
        (f"reward margin on {_PAIRS}, nats", "reward margin, nats"),
        _measured("heldout_reward_margin", "+.2f"),
    ),
    (
        "held out",
        ("accuracy of the reward that the next iteration pairs by",),
        _measured("heldout_step_accuracy", ".1%"),
    ),
    (
        "held out",
        ("answer to {num_sample_prompts:,} held-out prompts, characters", "answer, characters"),
        _measured("mean_response_characters", ",.0f"),
    ),
    ("held out", ("the same of the incumbent",), _measured("mean_response_characters_incumbent", ",.0f")),
    ("held out", ("growth in length",), _measured("response_characters_growth", "+.1%")),
    (
        "held out",
        ("answers cut by the token limit, the incumbent's in brackets", "answers cut by the token limit"),
        ("{share_cut_responses:.1%} [{share_cut_responses_incumbent:.1%}]", "{share_cut_responses:.1%}"),
    ),
    ("held out", ("drift from the first policy, nats a token",), _measured("drift_per_token", ".3f")),
    ("responses", ("generated",), ("{num_responses:,}",)),
    (
        "responses",
        ("filtered out before scoring",),
        ("{num_filtered:,}",),
    ),
    (
        "responses",
        ("rank agreement of the reward and the implicit one (Kendall's tau-b), {num_agreement_prompts:,} prompts",),
        ("{reward_agreement:+.2f}",),
    ),
    ("responses", ("pairs, generated + replayed",), ("{num_generated_pairs:,} + {num_replayed_pairs:,}",)),
    ("responses", ("length penalty, nats per {length_unit}",), ("{length_penalty:.4g}",)),
    ("responses", ("length penalty, paper's scale (x beta)",), ("{length_penalty_paper:.3g}",)),
    (
        "responses",
        ("length gap without -> with penalty, {length_unit}s",),
        ("{length_gap_unpenalised:+.1f} -> {length_gap:+.1f}",),
    ),
    (
        "training",
        ("DPO loss on {num_measured_pairs:,} training pairs, before -> after", "DPO loss, before -> after"),
        ("{first_loss:.4f} -> {last_loss:.4f}",),
    ),
    (
        "training",
        (
            "reward accuracy on {num_measured_pairs:,} training pairs, before -> after",
            "reward accuracy, before -> after",
        ),
        ("{first_reward_accuracy:.1%} -> {last_reward_accuracy:.1%}",),
    ),
    ("speed", ("response tokens generated a second, start of vLLM included",), ("{generated_tokens_per_second:,.0f}",)),
    ("speed", ("tokens trained a second",), ("{tokens_per_second:,.0f}",)),
    ("speed", ("share of the GPUs' peak that training uses (MFU)",), ("{mfu:.1%}",)),
    ("speed", ("peak memory of training, a process",), ("{peak_memory_bytes:GiB}",)),
)

_CHECKS = (
    ("loss at step 0", "{step0_loss:.6f}"),
    ("what it is with exact reference log-probs", "{step0_loss_expected:.6f}"),
    ("reference noise, nats", "{reference_noise_rms:.4f}"),
    ("spread of the implicit rewards, nats", "{implicit_reward_std:.3f}"),
    ("change of the weights", "{relative_update:.2e}"),
    ("of it lost to rounding when saved", "{update_rounding_loss:.1%}"),
)

_REASONS = {
    "length_limit": "ended by the token limit",
    "empty": "empty",
    "too_short": "too short",
    "too_long": "too long",
    "few_valid_responses": "its prompt has too few valid responses",
    "non_finite": "a log-prob is not a finite number",
    "few_finite_responses": "its prompt has too few responses with finite log-probs",
}

_RULE_SPECS = {
    "win_rate": ".1%",
    "length_controlled_win_rate": ".1%",
    "parsed_verdicts": ".1%",
    "empty_answers": ".1%",
    "accuracy_gain": "+.1pt",
    "accuracy_drop": "+.1pt",
    "cut_answers": "+.1pt",
    "length_growth": "+.1%",
}

TOTALS = ("responses generated", "responses scored", "pairs to train on")
"""Rows of the filters that are no loss but what is left."""


@dataclass(frozen=True)
class Column:
    """What a column of a table is about: an iteration, or a run among others."""

    name: str
    path: str
    """Of its values in the summary."""
    values: Summary


def columns_of(summary: Summary) -> list[Column]:
    """Return the iterations of a run, in order."""
    return [Column(str(one["name"]), f"iterations[{index}]", one) for index, one in enumerate(summary["iterations"])]


def column_names(summary: Summary) -> list[str]:
    """Return the names of the iterations, in order."""
    return [column.name for column in columns_of(summary)]


def overview(columns: Sequence[Column]) -> list[Row]:
    """Return the table of a run, or of several; rows that nobody has a number for are left out."""
    rows = [_row(columns, group, labels, cells) for group, labels, cells in _LINES]
    # The last iteration has all stages in their order; a warm start has some of them.
    stages = dict.fromkeys(stage for column in reversed(columns) for stage in column.values["seconds"])
    rows += [_row(columns, "time", (stage,), (f"{{seconds.{stage}:time}}",)) for stage in stages]
    rows += [_row(columns, "GPU hours", (stage,), (f"{{gpu_hours.{stage}:,.2f}}",)) for stage in stages]
    return [row for row in rows if row.is_known]


def rows_of(columns: Sequence[Column], lines: Sequence[tuple[str, str]]) -> list[Row]:
    """Return the rows of some labels and templates; those that nobody has a number for are left out."""
    rows = [_row(columns, "", (label,), (template,)) for label, template in lines]
    return [row for row in rows if row.is_known]


def numerical_checks(summary: Summary) -> list[Row]:
    """Return what says whether the numbers of training can be trusted."""
    return rows_of(columns_of(summary), _CHECKS)


def filters(summary: Summary) -> tuple[list[Row], list[str]]:
    """Return the way from responses generated to pairs trained on, and the reasons for which nothing was left out."""
    reasons = dict.fromkeys(reason for iteration in summary["iterations"] for reason in iteration["dropped"])
    table = [
        ("responses generated", "num_responses"),
        *((f"dropped: {_REASONS.get(reason, reason.replace('_', ' '))}", f"dropped.{reason}") for reason in reasons),
        ("responses scored", "num_scored"),
        ("repeated texts among the generated", "num_duplicate_responses"),
        ("scores left out: not a finite number", "num_non_finite_scores"),
        ("prompts left out: too few scored responses", "num_few_responses_prompts"),
        ("prompts left out: best and worst are one response", "num_tied_prompts"),
        ("pairs left out: both responses the same", "num_identical_pairs"),
        ("generated pairs that the replay ratio has no room for", "num_unused_generated_pairs"),
        ("offline pairs left out: both answers the same", "num_identical_offline_pairs"),
        ("offline pairs that were too few for the replay ratio", "num_missing_replayed_pairs"),
        ("pairs to train on", "num_train_pairs"),
        ("pairs to watch the loss on", "num_eval_pairs"),
        ("pairs dropped: longer than training.max_length", "num_dropped_pairs"),
    ]
    known = rows_of(columns_of(summary), [(label, f"{{{name}:,}}") for label, name in table])
    shown = [row for row in known if not row.is_zero or row.words in TOTALS]
    return shown, [row.words.removeprefix("dropped: ") for row in known if row not in shown]


@dataclass(frozen=True)
class GateRule:
    """A rule of the gate: what it looks at, and what it found in each iteration."""

    name: str
    what: str
    kind: str
    bound: Cell
    found: tuple[tuple[str, Cell], ...]
    """By iteration that has rules: holds, broken, not shown or nothing, and the value with its interval."""
    sentence: str
    """Of the last iteration that has it."""


def gate_rules(summary: Summary) -> list[GateRule]:
    """Return the gate's rules in its order."""
    latest = {
        rule["name"]: (i, j, rule)
        for i, one in enumerate(summary["iterations"])
        for j, rule in enumerate(one["gate"]["rules"])
    }
    return [_gate_rule(summary, name, *place) for name, place in latest.items()]


def _gate_rule(summary: Summary, name: str, iteration: int, index: int, rule: Summary) -> GateRule:
    bound = fill(rule, f"iterations[{iteration}].gate.rules[{index}]", (f"{{bound:{spec_of(name)}}}",))
    found = tuple(_rule_in(one, i, name) for i, one in enumerate(summary["iterations"]) if one["gate"]["rules"])
    return GateRule(name, str(rule["what"]), str(rule.get("kind", "")), bound, found, str(rule.get("sentence") or ""))


def _rule_in(iteration: Summary, index: int, name: str) -> tuple[str, Cell]:
    rules = iteration["gate"]["rules"]
    found = next((i for i, rule in enumerate(rules) if rule["name"] == name), None)
    if found is None:
        return "", (NOTHING,)
    path, spec, rule = f"iterations[{index}].gate.rules[{found}]", spec_of(name), rules[found]
    measured = (f"{{value:{spec}}} ({{low:{spec}}} to {{high:{spec}}})", f"{{value:{spec}}}")
    return {True: "holds", False: "broken"}.get(rule["passed"], "not shown"), fill(rule, path, measured)


def spec_of(rule: str) -> str:
    """Return how the numbers of a rule of the gate are written (evaluation/gate.py names the rules)."""
    return _RULE_SPECS.get(rule, ".3g")


def _row(columns: Sequence[Column], group: str, labels: Sequence[str], templates: Sequence[str]) -> Row:
    cells = tuple(fill(column.values, column.path, templates) for column in columns)
    return Row(group, _label(columns, labels), tuple(fields_of(templates[0])), cells)


def _label(columns: Sequence[Column], labels: Sequence[str]) -> Cell:
    """Return the label with the numbers of the last column that has them."""
    for column in reversed(columns):
        if all(look_up(column.values, name) is not None for name in fields_of(labels[0])):
            return fill(column.values, column.path, labels[:1])
    return fill({}, "", labels[-1:])


def summary_table(summary: Summary) -> str:
    """Return the verdict and the overview as plain text, for a terminal."""
    header = ("", *column_names(summary))
    body = [
        (f"{row.group}: {row.words}" if row.group else row.words, *map(text_of, row.cells))
        for row in overview(columns_of(summary))
    ]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    rule = tuple("-" * width for width in widths)
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in [header, rule, *body]
    ]
    return "\n".join([line.rstrip() for line in lines] + list(_remarks(summary)) + ["", summary["verdict"]["sentence"]])


def _remarks(summary: Summary) -> Iterable[str]:
    for one in summary["iterations"]:
        if one["status"] in ("not shown", "worse", "refused", "skipped") and one["reason"]:
            yield f"{one['name']} {one['status']}: {one['reason'].removeprefix(one['status'] + ': ')}"
        yield from (f"{one['name']}: {task} failed: {text}" for task, text in one["failures"].items())
    yield from (f"{task} failed: {text}" for task, text in summary["failures"].items())

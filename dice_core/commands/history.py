"""Command history: what a pointer has named, since when, by whom and on what evidence."""

from collections.abc import Sequence
from dataclasses import asdict

from dice_core.commands.table import Answer
from dice_core.storage.promotion import read_promotion, read_promotion_history
from dice_core.storage.promotion_history import Entry, History

_TITLES = ("", "#", "when (UTC)", "how", "state", "policy", "verdict", "by")


def history(pointer_uri: str) -> Answer:
    """Show what a promoted pointer has named: an entry a line, the last one at the end, the current one marked.

    Args:
        pointer_uri: the pointer, ROOT/promoted/NAME.json.
    """
    found = read_promotion_history(pointer_uri)
    states = found.states()
    entries = [{**asdict(entry), "state": states[entry.sequence]} for entry in found.entries]
    current = read_promotion(pointer_uri)
    values = {"pointer": pointer_uri, "current": vars(current) if current else None, "entries": entries}
    return Answer(_text(found, current.policy_uri if current else ""), values)


def _text(found: History, current_uri: str) -> str:
    states = found.states()
    rows = [_row(entry, states[entry.sequence]) for entry in found.entries]
    lines = _aligned([_TITLES, *rows]) if rows else []
    if not current_uri:
        lines.append(f"{found.uri}: nothing is promoted")
    elif not found.is_complete:
        # A pointer of an older version, or one that a person has edited.
        lines.append(f"* {found.uri} names {current_uri}, which no entry says")
    return "\n".join(lines)


def _row(entry: Entry, state: str) -> tuple[str, ...]:
    how = entry.how + (", forced" if entry.is_forced else "")
    by = entry.by + (f': "{entry.reason}"' if entry.reason else "")
    mark = "*" if state == "current" else ""
    return (mark, str(entry.sequence), entry.time, how, state, entry.policy_uri, _verdict(entry), by)


def _verdict(entry: Entry) -> str:
    """Return the evidence in a few words: the outcome, and the number that decided."""
    verdict = entry.verdict
    if not verdict:
        return "none"
    outcome = str(verdict.get("outcome") or ("accepted" if verdict.get("accepted") else "refused"))
    for name, title in (("win_rate", "win rate"), ("heldout_reward_accuracy", "accuracy")):
        if isinstance(value := verdict.get(name), float):
            low, high = verdict.get(f"{name}_low"), verdict.get(f"{name}_high")
            is_known = isinstance(low, float) and isinstance(high, float)
            return f"{outcome}, {title} {value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if is_known else "")
    return outcome


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = (" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in padded]

"""Numbers of a summary as a person reads them, each with the name under which summary.json holds it. Pure.

A cell of a table is a template such as "{first_loss:.4f} -> {last_loss:.4f}", filled in from the summary and from
nothing else: what the page shows can then be found in summary.json. Text is ASCII; page.py sets arrows and minus signs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

NOTHING = "-"
"""Stands in a table where a number is not known."""

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Number:
    """A number, or a word such as a judge's name, and where it stands in the summary."""

    name: str
    """Its path, such as iterations[1].win_rate."""
    value: Any
    text: str


Cell = tuple[str | Number, ...]
"""Text and numbers in the order of reading."""


def text_of(cell: Cell) -> str:
    """Return a cell as plain text."""
    return "".join(part if isinstance(part, str) else part.text for part in cell)


def is_known(cell: Cell) -> bool:
    """Return whether a cell says anything."""
    return any(isinstance(part, Number) for part in cell)


def fields_of(template: str) -> list[str]:
    """Return the names that a template asks for, in order."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def look_up(values: Values, name: str) -> Any:
    """Return what stands under a name with dots, such as seconds.train; None where there is nothing."""
    found: Any = values
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def fill(values: Values, path: str, templates: Sequence[str]) -> Cell:
    """Return the first template whose numbers are all known, filled in; "-" where there is none.

    Args:
        values: a part of the summary.
        path: of that part, which begins the names of its numbers; empty: the whole summary.
        templates: with str.format's fields and formats, and those of `written`.
    """
    for template in templates:
        if all(look_up(values, name) is not None for name in fields_of(template)):
            return _filled(values, path, template)
    return (NOTHING,)


def _filled(values: Values, path: str, template: str) -> Cell:
    parts: list[str | Number] = []
    for words, name, spec, _ in Formatter().parse(template):
        if words:
            parts.append(words)
        if name:
            value = look_up(values, name)
            parts.append(Number(f"{path}.{name}".lstrip("."), value, written(value, spec or "")))
    return tuple(parts)


def written(value: Any, spec: str) -> str:
    """Return a value as text.

    Args:
        value: a word is taken as it is.
        spec: as for `format`, or one of: `time`, of seconds; `GiB`, of bytes; and `pt` at the end of a format, of a
            share in percentage points.
    """
    if isinstance(value, str):
        return value
    if spec == "time":
        return _time(value)
    if spec == "GiB":
        return f"{value / 2**30:,.1f} GiB"
    if spec.endswith("pt"):
        spec = spec.removesuffix("pt")
        return f"{100 * value:{spec if spec.endswith('g') else f'{spec}f'}}"
    return f"{value:{spec}}"


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: a number that is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _time(seconds: float) -> str:
    if round(seconds) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"

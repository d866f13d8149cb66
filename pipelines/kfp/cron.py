"""KFP's cron expressions: six fields, seconds first, in the syntax of robfig/cron.

Each field is a list of numbers or names, ranges and steps. This file refuses what KFP accepts in silence and then never
runs, or runs too often.
"""

import re
from collections.abc import Sequence

from dice_core.settings.base import ConfigError

_FIELDS = {
    "second": (0, 59),
    "minute": (0, 59),
    "hour": (0, 23),
    "day of the month": (1, 31),
    "month": (1, 12),
    "day of the week": (0, 6),
}
_NAMES = {
    "month": ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "day of the week": ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
}
"""Names of a field's numbers, from the lowest."""
_ENTRY = re.compile(r"(?:[*?]|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/[1-9]\d*)?")


def check_cron(text: str) -> str:
    """Return a cron expression if it has six fields and starts at most one run an hour.

    KFP accepts five fields too, and reads the minutes as seconds.

    Raises:
        ConfigError: there are not six fields (for five, the message has the corrected form), a field is not such a
            time, or there is more than one run an hour.
    """
    fields = text.split()
    if len(fields) == len(_FIELDS) - 1:
        raise ConfigError(
            f"cron: KFP's has six fields, seconds first, and would misread these five: write '0 {' '.join(fields)}', "
            f"got {text!r}"
        )
    if len(fields) != len(_FIELDS):
        raise ConfigError(f"cron: must have the six fields {', '.join(_FIELDS)}, got {text!r}")
    for name, field in zip(_FIELDS, fields, strict=True):
        if not all(_fits(entry, name) for entry in field.split(",")):
            lowest, highest = _FIELDS[name]
            raise ConfigError(
                f"cron: the {name} must be from {lowest} to {highest}, or a list, range or step of these, got "
                f"{field!r} in {text!r}"
            )
    _check_hourly(fields, text)
    return " ".join(fields)


def _check_hourly(fields: Sequence[str], text: str) -> None:
    """Refuse several seconds or minutes: a run takes longer than an hour."""
    exact = [field if field.isdecimal() else "0" for field in fields[:2]]
    for name, field, wanted in zip(_FIELDS, fields, exact, strict=False):
        if field != wanted:
            raise ConfigError(
                f"cron: would start runs less than an hour apart, the {name} must be one number: write "
                f"'{' '.join([*exact, *fields[2:]])}', got {text!r}"
            )


def _fits(entry: str, name: str) -> bool:
    """Return whether one entry of a field's list is valid: well formed, within bounds, in order."""
    match = _ENTRY.fullmatch(entry)
    if match is None:
        return False
    (lowest, highest), names = _FIELDS[name], _NAMES.get(name, ())
    words = [word.lower() for word in match.group("first", "last") if word]
    ends = [lowest + names.index(word) if word in names else int(word) if word.isdecimal() else -1 for word in words]
    return all(lowest <= end <= highest for end in ends) and ends == sorted(ends)

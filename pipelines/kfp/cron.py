"""KFP's cron expressions: six fields, seconds first, in the syntax of robfig/cron.

Each field is a list of numbers or names, ranges and steps. This file refuses what KFP accepts in silence and then never
runs, or runs too often. cronsim computes the times: a day matches either the day of the month or that of the week where
both are restricted, as in KFP.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

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
_ALIASES = {
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *",
    "@midnight": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}
_HORIZON = timedelta(days=5 * 366)
"""robfig/cron looks no further, and then answers with the year 1, for which KFP would start runs at once."""
_ENTRY = re.compile(r"(?:[*?]|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/[1-9]\d*)?")


def check_cron(text: str) -> str:
    """Return a cron expression, of a word such as @weekly the fields, if it starts runs, and at most one an hour.

    KFP accepts five fields too, and reads the minutes as seconds.

    Raises:
        ConfigError: there are not six fields (for five, the message has the corrected form), a field is not such a
            time, there is more than one run an hour, or the day never comes.
    """
    fields = _ALIASES.get(text.strip(), text).split()
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
    now = datetime.now(UTC)
    comes = next_start(" ".join(fields), now)
    if comes is None or comes > now + _HORIZON:
        raise ConfigError(f"cron: no such day comes within five years, got {text!r}")
    return " ".join(fields)


def next_start(cron: str, now: datetime) -> datetime | None:
    """Return when an expression that is well formed starts a run; None: not in fifty years."""
    from cronsim import CronSim, CronSimError

    *others, weekday = cron.replace("?", "*").split()
    # From Sunday as 0 to Saturday: cronsim would go on to Sunday as 7.
    weekday = re.sub(r"(^|,)(\w+)/", r"\1\2-6/", weekday)
    try:
        return next(CronSim(" ".join([*others, weekday]), now), None)
    except CronSimError:
        # All that is left to say of a well-formed one: the month has no such day.
        return None


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

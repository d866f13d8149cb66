"""`training.learning_rate=1e-6` on a command line, into the settings of a stage.

Knows the form of an assignment and the names of the sections. The settings classes check fields and values.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dice_core.settings.base import ConfigError
from dice_core.settings.hints import allowed


def parse_overrides(assignments: Iterable[str], sections: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return section -> field -> value for assignments such as `training.beta=0.1`.

    The value is JSON where it can be read so (numbers, true, [1, 2]) and a word otherwise; it may hold `=`.

    Raises:
        ConfigError: not of that form, or a section that is not one of `sections`; the nearest name is suggested.
    """
    known, values = list(sections), dict[str, dict[str, Any]]()
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        section, dot, field = name.partition(".")
        if not (equals and dot and section and field):
            raise ConfigError(f"{assignment!r}: must be SECTION.FIELD=VALUE, such as training.learning_rate=1e-6")
        if section not in known:
            raise ConfigError(f"{name}: unknown section {section!r}, {allowed(section, known)}")
        values.setdefault(section, {})[field] = _read_value(text)
    return values


def merge_overrides(
    base: Mapping[str, Mapping[str, Any]], overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the sections of both, field by field; an override wins."""
    return {section: {**base.get(section, {}), **overrides.get(section, {})} for section in {**base, **overrides}}


def _read_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

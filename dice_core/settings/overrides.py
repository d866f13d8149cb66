"""`training.learning_rate=1e-6` on a command line, into the settings of a stage.

Knows the form of an assignment and the names of settings. The settings classes check values.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dice_core.settings.base import ConfigError, Settings
from dice_core.settings.hints import allowed, nearest

_NONE: Mapping[str, str] = {}


def parse_overrides(
    assignments: Iterable[str], sections: Mapping[str, type[Settings]], owners: Mapping[str, str] = _NONE
) -> dict[str, dict[str, Any]]:
    """Return section -> field -> value for assignments such as `training.beta=0.1`.

    The value is JSON where it can be read so (numbers, true, [1, 2]) and a word otherwise; it may hold `=`.

    Args:
        assignments: to read.
        sections: their classes by name.
        owners: for the name of a field that no section has: the setting that decides it.

    Raises:
        ConfigError: not of that form, or no setting of these sections; what may be meant is named.
    """
    values = dict[str, dict[str, Any]]()
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        section, dot, field = name.partition(".")
        if not (equals and dot and section and field):
            meant = with_field(name, sections) if equals else []
            hint = f"did you mean {' or '.join(meant)}? " if meant else ""
            raise ConfigError(f"{assignment!r}: {hint}must be SECTION.FIELD=VALUE, such as training.learning_rate=1e-6")
        elsewhere = [owners[field]] if field in owners else with_field(field, sections)
        if section not in sections:
            meant = nearest(section, sections) or elsewhere
            raise ConfigError(f"{name}: unknown section {section!r}, {allowed(section, sections, meant)}")
        if field not in (known := sections[section].model_fields):
            raise ConfigError(f"{name}: unknown setting, {allowed(field, known, elsewhere)}")
        values.setdefault(section, {})[field] = _read_value(text)
    return values


def with_field(field: str, sections: Mapping[str, type[Settings]]) -> list[str]:
    """Return the full names of the settings that a name without its section may mean."""
    return [f"{name}.{field}" for name, kind in sections.items() if field in kind.model_fields]


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

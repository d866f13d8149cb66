"""What settings there are, for `--help`: a line of name, type and default for each, and its meaning below it. Pure."""

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from dice_core.settings.base import Settings

_WORDS = {"integer": "int", "number": "float", "boolean": "true or false", "string": "text", "array": "list"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def settings_help(sections: Mapping[str, type[Settings] | Settings], width: int = 100) -> str:
    """Return every setting of some sections.

    Args:
        sections: by name: a class shows its defaults, an instance the values that it has.
        width: of a line.
    """
    return "\n".join(line for name, section in sections.items() for line in _section_lines(name, section, width))


def _section_lines(section: str, settings: type[Settings] | Settings, width: int) -> list[str]:
    settings = settings() if isinstance(settings, type) else settings
    lines, values = [], settings.to_dict()
    for name, schema in type(settings).model_json_schema()["properties"].items():
        lines.append(f"  {section}.{name}={_as_typed(values[name])}  ({type_in_words(schema)})")
        lines += textwrap.wrap(schema.get("description", ""), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def type_in_words(schema: Mapping[str, Any]) -> str:
    """Return what a JSON schema allows, such as `int >= 1` or `float32 or bfloat16`."""
    if "anyOf" in schema:
        return " or ".join(type_in_words(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(str(word) for word in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "object":
        return "JSON object"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    word = _WORDS[schema["type"]]
    if word == "list":
        word += f" of {type_in_words(schema['items'])}"
    return " ".join([word, ", ".join(bounds)]).strip()


def _as_typed(value: Any) -> str:
    """Return a value as a person types it behind the `=`."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

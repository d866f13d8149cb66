"""What every class of settings has: strict types, no unknown keys, errors of one line, a fingerprint.

A class stands in the room that reads it, in `settings.py`. `operational` settings (memory, batch sizes, logging) change
how fast a stage runs and not what it computes. They stay out of its fingerprint, so that a run that ran out of memory
resumes with smaller batches.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.config import JsonDict

from dice_core.settings.hints import allowed


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line: the field, the value, what is allowed."""


def _integral(value: Any) -> Any:
    """Turn 16.0 into 16: Kubeflow Pipelines hands every number of a dict parameter over as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tuple(value: Any) -> Any:
    """Accept the list that JSON has where a tuple belongs."""
    return tuple(value) if isinstance(value, list) else value


Int = Annotated[int, BeforeValidator(_integral)]
Ints = Annotated[tuple[Int, ...], BeforeValidator(_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
DType = Literal["float32", "bfloat16"]

Values = Mapping[str, Any] | None
"""Settings as they arrive: plain JSON types, or None for all defaults."""

OPERATIONAL: JsonDict = {"operational": True}
ADDED: JsonDict = {"added": True}
"""Of a setting that came when there were runs already, with a default that is their way: at its default it stays out of
the fingerprint, so that they go on."""


class Settings(BaseModel):
    """Base of every settings class: frozen, strict about types, closed to unknown keys."""

    # The docstring below a field is its meaning, which --help shows.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def parse(cls, values: Values, where: str) -> Self:
        """Build the settings from a plain mapping.

        Args:
            values: field names to values, as JSON or a Kubeflow Pipelines parameter has them; None means all defaults.
            where: the name the person knows these settings by, such as "training"; it opens the error message.

        Raises:
            ConfigError: one line naming the first field at fault, its value, and what is allowed.
        """
        try:
            return cls.model_validate(dict(values or {}))
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, where)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, every field present."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """Return a hex digest of the settings that decide results.

        Operational ones are left out, and so are added ones that have their default.
        """
        values, added = self.model_dump(mode="json", exclude=self.operational()), self.added()
        counted = {name: value for name, value in values.items() if name not in added or value != added[name]}
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()

    @classmethod
    def operational(cls) -> set[str]:
        """Return the names of the settings that change how fast a stage runs and not what it computes."""
        return cls._marked("operational")

    @classmethod
    def added(cls) -> dict[str, Any]:
        """Return the settings that came when there were runs already, with what those ran with, as JSON has it."""
        # Not validated: a class may ask for this while it validates.
        defaults = cls.model_construct().to_dict()
        return {name: defaults[name] for name in cls._marked("added")}

    @classmethod
    def _marked(cls, mark: str) -> set[str]:
        extras = ((name, field.json_schema_extra) for name, field in cls.model_fields.items())
        return {name for name, extra in extras if isinstance(extra, dict) and mark in extra}


def _explain(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith("function-")]
    if first["type"] == "extra_forbidden":
        return _explain_unknown(cls, path, where)
    if not path:
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    # A union (a word or a number) reports one error for each member: all of them say what is allowed.
    said = [e["msg"] for e in error.errors() if e["loc"][:1] == first["loc"][:1]]
    messages = [message.removeprefix("Input ").removeprefix("Value error, ") for message in said]
    return f"{where}.{path[0]}: {', or '.join(dict.fromkeys(messages))}, got {json.dumps(first['input'], default=str)}"


def _explain_unknown(cls: type[BaseModel], path: list[str], where: str) -> str:
    for name in path[:-1]:
        annotation = cls.model_fields[name].annotation
        cls, where = annotation, f"{where}.{name}"  # type: ignore[assignment]
    return f"{where}.{path[-1]}: unknown setting, {allowed(path[-1], cls.model_fields)}"

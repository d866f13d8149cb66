"""Small JSON files that other versions of this package may have written, read into dataclasses.

A field that this version does not know is left out, and told where DICE_DEBUG is set: an older reader goes on with what
it understands. A field that it knows must have its type.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from dice_core.progress import debug

Record = TypeVar("Record")


def read_record(kind: type[Record], data: bytes, where: str) -> Record:
    """Return the record that JSON text holds.

    Args:
        kind: a dataclass.
        data: the text.
        where: what messages call it.

    Raises:
        ValueError: not JSON, or a field is missing or of another type; one line.
    """
    try:
        record = TypeAdapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None
    if unknown := _unknown(from_json(data), asdict(record)):  # type: ignore[call-overload]
        debug(f"{where}: fields of a later version are ignored: {', '.join(unknown)}")
    return record


def _unknown(stored: Mapping[str, Any], understood: Mapping[str, Any], place: str = "") -> list[str]:
    found = []
    for name, value in stored.items():
        if name not in understood:
            found.append(place + name)
        elif isinstance(value, dict) and isinstance(understood[name], dict):
            found += _unknown(value, understood[name], f"{place}{name}.")
    return found

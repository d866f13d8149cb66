"""What a result is identified by, and what has changed since it was made: the comparison that every refusal goes by.

The runner compares a stage with its own place, held_by_run.py a run's settings with all that it holds.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from dice_core.settings.base import Settings
from dice_core.stages.table import Stage
from dice_core.storage.manifest import Manifest

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Difference:
    """A setting, or anything else that decides a result, with which a result was not made."""

    name: str
    then: Any
    now: Any

    def __str__(self) -> str:
        then, now = (_short(value) for value in (self.then, self.now))
        return f"{self.name} was {then}, now {now}"


def fingerprint(
    stage: Stage, settings: Mapping[str, Settings], arguments: Mapping[str, Any], digests: Mapping[str, str]
) -> str:
    """Return the identity of a result.

    Args:
        stage: its row of the table.
        settings: by section; operational ones do not count.
        arguments: what else decides the result (seed, shard).
        digests: name of an input to the digest of its content.
    """
    facts = {
        "stage": stage.name,
        "format_version": stage.format_version,
        "settings": {name: value.fingerprint() for name, value in settings.items()},
        "arguments": dict(arguments),
        "inputs": dict(digests),
    }
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def differences(recorded: Manifest, settings: Mapping[str, Settings], arguments: Mapping[str, Any]) -> list[Difference]:
    """Return the settings and arguments that are not those of a result; operational ones may differ."""
    found = [
        Difference(f"{section}.{name}", recorded.settings.get(section, {}).get(name, chosen.added().get(name)), value)
        for section, chosen in settings.items()
        for name, value in chosen.to_dict().items()
        if name not in chosen.operational()
    ]
    # A section that is recorded and not compared, such as where sources came from, is an object.
    others = [name for name, value in recorded.settings.items() if not isinstance(value, dict)]
    names = dict.fromkeys([*others, *arguments])
    found += [Difference(name, recorded.settings.get(name), arguments.get(name)) for name in names]
    return [difference for difference in found if difference.then != difference.now]


def _short(value: Any) -> str:
    """Return a value as it is written; of a digest its beginning."""
    return value[:12] if isinstance(value, str) and _DIGEST.fullmatch(value) else repr(value)

"""The settings of a run in one file: check-settings writes it, and every later task of the run reads its part.

A task's parameters stand six times in its workflow, which has to fit into etcd: an address is shorter than settings.
The file's name ends in a digest of its content. A run that is started again with other operational settings gets
another file, and a retried task reads what it read before. Loads no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from dice_core.stages.place import WARM_START, Place
from dice_core.stages.table import TRAIN, WARM_START_TRAINING, Stage
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError

_NAME = "settings-{}.json"
_DIGITS = 12


@dataclass(frozen=True)
class Task:
    """A task of a run, with what the run was started with."""

    run_uri: str
    place: Place
    sections: Mapping[str, Mapping[str, Any]]
    plan: Mapping[str, Any]
    """Everything else that check-settings has checked: seed, sources, numbers of iterations and shards."""

    @property
    def uri(self) -> str:
        """Where its stage writes."""
        return layout.join(self.run_uri, self.place.below)

    @property
    def root(self) -> str:
        """Where all runs keep their data."""
        return self.run_uri.rpartition("/runs/")[0]

    def of(self, stage: Stage) -> "Task":
        """Return what one of the stages has to do that this task runs."""
        return replace(self, place=self.place.of(stage))

    def settings(self, stage: Stage) -> dict[str, Any]:
        """Return the sections of a stage, by name; the warm start trains with settings of its own."""
        found: dict[str, Any] = {name: self.sections.get(name, {}) for name in stage.sections}
        if stage is TRAIN and self.place.iteration == WARM_START:
            found["training"] = self.sections[WARM_START_TRAINING]
        return found


def write_settings(run_uri: str, sections: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """Keep what a run is started with, and return the address."""
    data = json.dumps({"sections": sections, "plan": plan}, sort_keys=True, indent=1).encode()
    place, name = layout.check_settings(run_uri), _NAME.format(_digest(data))
    open_storage(place).write_bytes(name, data)
    return layout.join(place, name)


def read_task(settings_uri: str, place: str) -> Task:
    """Return a task of a run.

    Args:
        settings_uri: as write_settings returned it.
        place: of the task's stage below the run, such as iteration-1/train.

    Raises:
        StorageError: the settings are not there, or not those that were written.
    """
    folder, _, name = settings_uri.rpartition("/")
    data = open_storage(folder).read_bytes(name)
    if name != _NAME.format(_digest(data)):
        raise StorageError(
            f"{settings_uri}: changed since check-settings wrote it: make submit RUN= with the same name"
        )
    found = json.loads(data)
    return Task(layout.run_uri_of(settings_uri), Place.parse(place), found["sections"], found["plan"])


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:_DIGITS]

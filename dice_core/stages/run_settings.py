"""The settings of a run in one file: check-settings writes it, and every later task of the run reads its part.

A task's parameters stand six times in its workflow, which has to fit into etcd: an address is shorter than settings,
and from it and from the task's place follows where the task's inputs are. The file's name ends in a digest of its
content. A run that is started again with other operational settings gets another file, and a retried task reads what it
read before. Loads no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from dice_core.stages.judge_models import kind_for
from dice_core.stages.place import WARM_START, Place
from dice_core.stages.table import EVALUATE, TRAIN, WARM_START_TRAINING, Stage
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

    @property
    def iteration(self) -> int:
        """Its iteration; 0 is the warm start."""
        return self.place.iteration or WARM_START

    @property
    def data_uri(self) -> str:
        """Where prepare-data writes."""
        return layout.data(self.run_uri)

    @property
    def gate_uri(self) -> str:
        """The evaluation of the iteration before; empty in the first."""
        return self._stage(self.iteration - 1, EVALUATE) if self.iteration > 1 else ""

    def policy_uri(self, iteration: int) -> str:
        """Return the policy pi_t that an iteration makes.

        Args:
            iteration: 0 is the run's first policy, -1 what the DPO of that one started from.
        """
        if iteration > 0:
            return self._stage(iteration, TRAIN)
        # The policy of the source is what a warm start begins with; without one, it is the first itself.
        has_warm_start = not self.plan["reference_source"]
        if iteration == 0 and has_warm_start:
            return layout.warm_start(self.run_uri, TRAIN.name)
        return self.imported_uri("policy" if iteration == 0 or has_warm_start else "reference")

    def judge_uri(self, role: str) -> str:
        """Return the model of a role, judge or reward; empty: the run has none, or its settings do not use it."""
        is_used = self.plan[f"{role}_source"] and kind_for(role, self.sections)
        return self.imported_uri(role) if is_used else ""

    def imported_uri(self, role: str) -> str:
        """Return where the model of a role is kept: policy, reference, judge or reward."""
        return layout.imported_model(self.root, self.plan[f"{role}_source"])

    def _stage(self, iteration: int, stage: Stage) -> str:
        return layout.stage(self.run_uri, iteration, stage.name)

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

"""Why a stage's last attempt failed: a small `failure.json` at the stage's own place, for people and the next attempt.

stages/attempts.py writes it; the report and `make status` read it. A stage that is killed (for want of memory, with its
node) leaves none, and one that completes or begins again deletes it: where there is none, nothing is claimed.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from dice_core import __version__
from dice_core.progress import log
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import MissingObjectError
from dice_core.storage.stored_record import read_record
from dice_core.storage.transfers import side_by_side

# Of the retried nodes of a workflow, from the outermost: "demo-x1(0).root(0).train(0).executor(1)".
_RETRIES = re.compile(r"\((\d+)\)(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class StageFailure:
    """Why an attempt of a stage failed."""

    stage: str
    reason: str
    """One line: what, where, what to do."""
    is_final: bool
    """Every other attempt would meet it too, until a person changes something."""
    time: str
    """UTC, such as 2026-11-29T00:01:31Z."""
    pod: str = ""
    """Empty outside a cluster."""
    node: str = ""
    """Argo's name of the attempt; it says which of a workflow's attempts this was."""
    package_version: str = __version__
    place: str = ""
    """Of the stage below its run, such as iteration-1/train. The readers fill it in."""

    @property
    def attempt(self) -> int:
        """Which attempt of its task it was, from 1; 0 where that is not known."""
        *outer, last = attempt_number(self.node) or (0, -1)
        return 0 if any(outer) else last + 1

    @property
    def workflow(self) -> str:
        """Name of the workflow that the attempt belonged to; empty: of none."""
        return self.node.partition(".")[0].partition("(")[0]

    @property
    def iteration(self) -> int | None:
        """Number of its iteration, 0 of the warm start; None of a stage of the whole run."""
        return layout.iteration_of(self.place)

    @property
    def shard(self) -> tuple[int, int] | None:
        """Its shard, from 0, and how many there are; None of a stage without shards."""
        place = layout.parse_place(self.place)
        return place.shard if place else None

    @property
    def title(self) -> str:
        """What people call the task: "iteration 1: generate 4 of 8", "warm start: train", "import-model zephyr"."""
        if self.iteration is None:
            return " ".join([self.stage, *self.place.split("/")[1:]])
        shard = f" {self.shard[0] + 1} of {self.shard[1]}" if self.shard else ""
        return f"{f'iteration {self.iteration}' if self.iteration else 'warm start'}: {self.stage}{shard}"

    @property
    def where(self) -> str:
        """What is known of the attempt: "attempt 2, pod x"."""
        known = [f"attempt {self.attempt}" if self.attempt else "", f"pod {self.pod}" if self.pod else ""]
        return ", ".join(filter(None, known))


def attempt_number(node: str) -> tuple[int, ...]:
    """Return how often each part of a workflow around an attempt was started anew; later attempts compare higher.

    A retry by a person begins again at 0. Empty: not an attempt of a workflow.
    """
    return tuple(int(number) for number in _RETRIES.findall(node))


def read_failure(uri: str) -> StageFailure | None:
    """Return why the last attempt of the stage at a place failed; None where that is not known."""
    try:
        return _parse(open_storage(uri).read_bytes(layout.FAILURE), uri, "")
    except MissingObjectError:
        return None


def write_failure(uri: str, failure: StageFailure) -> None:
    """Say at a stage's place why its attempt failed, instead of what an earlier attempt said."""
    open_storage(uri).write_bytes(layout.FAILURE, json.dumps(asdict(failure), indent=1).encode())


def delete_failure(uri: str) -> None:
    """Take back why an earlier attempt failed."""
    open_storage(uri).delete(layout.FAILURE)


def failures_of_run(run_uri: str) -> list[StageFailure]:
    """Return why stages of a run failed whose last attempt left a reason, in the order of their places.

    Costs a listing of the run and a request for each failure.
    """
    return failures_among(run_uri, (found.key for found in open_storage(run_uri).list()))


def failures_among(run_uri: str, keys: Iterable[str]) -> list[StageFailure]:
    """Return those failures among the keys of a run, which the caller has listed."""
    storage, names = open_storage(run_uri), [key for key in keys if key.rpartition("/")[2] == layout.FAILURE]

    def read(key: str) -> StageFailure | None:
        try:
            return _parse(storage.read_bytes(key), layout.join(run_uri, key), key.rpartition("/")[0])
        except MissingObjectError:
            # Its stage has begun again since the listing.
            return None

    return [failure for failure in side_by_side(read, names) if failure]


def _parse(data: bytes, where: str, place: str) -> StageFailure | None:
    try:
        return replace(read_record(StageFailure, data, where), place=place)
    except ValueError as error:
        log(f"{where}: not a reason that this version ({__version__}) reads: {error}")
        return None

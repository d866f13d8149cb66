"""What led to a promoted pointer: an entry beside it for each step, written once and never changed.

    promoted/zephyr.json                    the pointer: what is promoted
    promoted/zephyr.history/000001.json     an entry: who wrote what there, when, and on what evidence

A step writes its entry first, under the next number and only if nobody else has that number, and then the pointer, only
if that still is what the step has read. So of two writers one wins. An entry whose pointer was never written (its
writer was killed, or lost) is told from the others by content: each entry holds the text that it wrote to the pointer
and the digest of the text that it found there, and these lead back from what the pointer says now.

Knows no more of a pointer than its text; promotion.py owns what that means.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Literal

from dice_core import __version__
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import ConflictError, StorageError, UnfitError
from dice_core.storage.stored_record import read_record
from dice_core.storage.transfers import side_by_side

How = Literal["auto", "manual", "rollback", "proposal", "found"]
"""By its gate, by a person, back to an earlier policy; proposed to a person; or found there without an entry."""
State = Literal["current", "replaced", "never in effect", "open", "promoted", "superseded", "?"]

Number = bool | int | float | str | None

_SUFFIX = ".json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A step in the life of a pointer."""

    sequence: int = 0
    """From 1; 0 until it is written."""
    how: How
    time: str = ""
    """UTC."""
    by: str = ""
    """Who: a run and its iteration, or a person at a machine."""
    policy_uri: str
    content_digest: str
    replaced_uri: str = ""
    replaced_digest: str = ""
    """The policy that was promoted before; empty: none."""
    evaluated: str = ""
    """The evaluation that the step rests on; empty: none."""
    verdict: dict[str, Number] = field(default_factory=dict)
    """What that evaluation says, flat."""
    run: str = ""
    iteration: int = 0
    is_forced: bool = False
    """A person went against the evaluation, or there was none."""
    reason: str = ""
    """What the person gave for it."""
    registered_model: str = ""
    """Name in a model registry; empty: that of the pointer."""
    pointer: str = ""
    """The text of the pointer that the step wrote; empty for a proposal, which writes none."""
    before: str = ""
    """SHA-256 of the text that the step found in the pointer; empty: there was none, or it is not known."""
    package_version: str = __version__

    def to_json(self) -> bytes:
        """Return the stored form."""
        return json.dumps(asdict(self), indent=1).encode()

    def is_same_step(self, other: "Entry") -> bool:
        """Return whether another entry is that of an earlier attempt of this step."""
        names = ("how", "content_digest", "evaluated", "before", "pointer")
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclass(frozen=True)
class History:
    """The entries of a pointer in their order, and what the pointer says now."""

    uri: str
    entries: tuple[Entry, ...]
    pointer: str | None
    """Text of the pointer; None: there is none."""

    @property
    def next_sequence(self) -> int:
        """The number of the next entry."""
        return self.entries[-1].sequence + 1 if self.entries else 1

    @property
    def chain(self) -> list[Entry]:
        """The entries that were in effect, from the current one back to where they cannot be followed."""
        found: list[Entry] = []
        wanted, rest = digest(self.pointer), list(self.entries)
        while wanted:
            entry = next((entry for entry in reversed(rest) if digest(entry.pointer) == wanted), None)
            if entry is None:
                break
            found.append(entry)
            rest, wanted = [other for other in rest if other.sequence < entry.sequence], entry.before
        return found

    @property
    def previous(self) -> Entry | None:
        """What was in effect before the current policy was promoted; None where the entries do not tell.

        After a rollback that is one step further back, and not what was just left.
        """
        chain = self.chain
        promoted = [i for i, entry in enumerate(chain) if entry.how != "rollback" and entry.pointer == self.pointer]
        before = chain[promoted[0] + 1 :] if promoted else []
        return before[0] if before else None

    @property
    def is_complete(self) -> bool:
        """Whether an entry holds what the pointer says. An older version and a person's editor write none."""
        return not self.pointer or bool(self.chain)

    def states(self) -> dict[int, State]:
        """Return what each entry is now, by its number."""
        chain = [entry.sequence for entry in self.chain]
        return {entry.sequence: self._state(entry, chain) for entry in self.entries}

    def _state(self, entry: Entry, chain: Sequence[int]) -> State:
        if entry.how == "proposal":
            return self._state_of_proposal(entry, chain)
        if entry.sequence in chain:
            return "current" if entry.sequence == chain[0] else "replaced"
        # What was there before the first entry that can be followed is not known.
        return "never in effect" if chain and entry.sequence > chain[-1] else "?"

    def _state_of_proposal(self, proposal: Entry, chain: Sequence[int]) -> State:
        later = [entry for entry in self.entries if entry.sequence > proposal.sequence]
        taken = [entry for entry in later if entry.content_digest == proposal.content_digest]
        # A promotion that was interrupted leaves the proposal open: the same command finishes it.
        if any(self._state(entry, chain) != "never in effect" for entry in taken if entry.how != "proposal"):
            return "promoted"
        # Another policy took the place that the proposal was measured against, or another one is proposed by now.
        current = self.chain[0].content_digest if self.chain else ""
        is_open = current == proposal.replaced_digest and not any(entry.how == "proposal" for entry in later)
        return "open" if is_open else "superseded"

    def entry(self, sequence: int) -> Entry:
        """Return an entry by its number.

        Raises:
            UnfitError: there is none.
        """
        for entry in self.entries:
            if entry.sequence == sequence:
                return entry
        have = f"it has 1 to {self.entries[-1].sequence}" if self.entries else "it has none"
        raise UnfitError(f"{self.uri}: has no entry {sequence} in its history, {have}")

    def open_proposal(self) -> Entry | None:
        """Return the policy that waits for a person's word, or None."""
        states = self.states()
        return next((entry for entry in self.entries if states[entry.sequence] == "open"), None)


def digest(text: str | None) -> str:
    """Return what a text of the pointer is told by; empty where there is none."""
    return sha256(text.encode()).hexdigest() if text else ""


def read_history(uri: str, pointer: str | None) -> History:
    """Return the history of a pointer.

    Args:
        uri: of the pointer.
        pointer: its text as it was just read; None: there is none.

    Raises:
        StorageError: an entry cannot be read.
    """
    place = layout.promotion_history(uri)
    storage = open_storage(place)
    keys = [found.key for found in storage.list() if _sequence(found.key)]
    entries = [
        _parse(data, layout.join(place, key))
        for key, data in zip(keys, side_by_side(storage.read_bytes, keys), strict=True)
    ]
    return History(uri, tuple(sorted(entries, key=lambda entry: entry.sequence)), pointer)


def append(uri: str, entry: Entry) -> None:
    """Write an entry under its number, which must be free.

    Raises:
        ConflictError: somebody else has taken the number.
    """
    key = f"{entry.sequence:06d}{_SUFFIX}"
    place = layout.promotion_history(uri)
    try:
        open_storage(place).write_if_version(key, entry.to_json(), None)
    except ConflictError:
        raise ConflictError(
            f"{uri}: not moved to {entry.policy_uri}: somebody else wrote {layout.join(place, key)} at the same "
            "moment: look at `dice history`, and promote again if that still is right"
        ) from None


def now() -> str:
    """Return the time of an entry."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def flat(values: Mapping[str, object]) -> dict[str, Number]:
    """Return the plain values among some, as an entry keeps them; what is not finite is unknown, None."""
    kept: dict[str, Number] = {}
    for name, value in values.items():
        if isinstance(value, float):
            kept[name] = value if abs(value) < float("inf") else None
        elif value is None or isinstance(value, bool | int | str):
            kept[name] = value
    return kept


def _sequence(key: str) -> int:
    stem = key.removesuffix(_SUFFIX)
    return int(stem) if key.endswith(_SUFFIX) and stem.isdecimal() else 0


def _parse(data: bytes, where: str) -> Entry:
    try:
        entry = read_record(Entry, data, where)
    except ValueError as error:
        raise StorageError(f"{where}: not an entry of a promoted pointer's history: {error}") from None
    if entry.sequence != _sequence(where.rpartition("/")[2]):
        raise StorageError(f"{where}: holds entry {entry.sequence}: entries are never renamed or copied")
    return entry

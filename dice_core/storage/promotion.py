"""The pointer to the last promoted policy: what a recurring run starts from and what people deploy.

Changed by conditional writes, so that of two writers one sees the other's policy. promotion_history.py keeps every step
beside the pointer. Whether a policy should be promoted is decided elsewhere: by the gate, or by a person.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from dice_core import __version__
from dice_core.progress import log
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import ConflictError, Storage, StorageError, UnfitError
from dice_core.storage.manifest import require_manifest
from dice_core.storage.probe import require_writable
from dice_core.storage.promotion_history import Entry, History, How, append, digest, flat, now, read_history
from dice_core.storage.stored_record import read_record


@dataclass(frozen=True)
class Promotion:
    """A promoted policy: where it is, what it is, and who said so."""

    policy_uri: str
    content_digest: str
    evaluated: str
    """The evaluate stage that accepted it; empty: a person promoted it without one."""
    iteration: int
    replaces: str = ""
    """URI of the policy that was promoted before."""
    reference_uri: str = ""
    """What the policy was trained from: the reference of its implicit reward, for a run that starts from it."""
    package_version: str = __version__


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a step of a pointer rests on, for its entry in the history."""

    verdict: Mapping[str, object] | None = None
    """Of the evaluation: plain values by name; the others are left out."""
    how: How = "auto"
    by: str = ""
    """Who; empty: the run of the policy."""
    is_forced: bool = False
    reason: str = ""
    registered_model: str = ""


class MovedError(ConflictError):
    """The pointer names another policy than the one that the new policy was measured against."""


def read_promotion(uri: str) -> Promotion | None:
    """Return what the pointer says, or None where nothing was promoted yet.

    Raises:
        StorageError: what is there is not a promotion.
    """
    return _Pointer.read(uri).promotion


def read_promotion_history(uri: str) -> History:
    """Return how the pointer came to say what it says; no entries where no version has kept any.

    Raises:
        StorageError: the pointer or an entry cannot be read.
    """
    return _Pointer.read(uri).history()


def require_promotable(uri: str) -> None:
    """Check that a pointer can be moved, before the work that decides whether it is.

    Raises:
        StorageError: what is there is not a promotion, or nothing can be written beside it.
    """
    read_promotion_history(uri)
    require_writable(_place(uri)[0].uri)


def promote(
    uri: str,
    policy_uri: str,
    content_digest: str,
    *,
    evaluated: str,
    iteration: int,
    reference_uri: str = "",
    incumbent: str | None = None,
    evidence: Evidence | None = None,
) -> Promotion:
    """Point to a policy, and keep the step in the history. Nothing happens where the pointer names it already.

    Args:
        uri: of the pointer.
        policy_uri: the policy.
        content_digest: of its manifest.
        evaluated: the evaluation that it rests on.
        iteration: that made the policy.
        reference_uri: what it was trained from.
        incumbent: content digest of the policy that the pointer must still name, empty for none; None: any.
        evidence: for the history.

    Raises:
        MovedError: the pointer names another policy than the incumbent by now.
        ConflictError: another run promoted at the same moment; running the stage again decides anew.
    """
    pointer = _Pointer.read(uri)
    before = pointer.promotion
    if before and before.content_digest == content_digest:
        return before
    pointer.require_incumbent(incumbent, policy_uri)
    replaces = before.policy_uri if before else ""
    promotion = Promotion(policy_uri, content_digest, evaluated, iteration, replaces, reference_uri)
    text = json.dumps(asdict(promotion), indent=1)
    pointer.move(replace(pointer.step(promotion, evidence or Evidence()), pointer=text))
    log(f"promoted: {uri} now points to {policy_uri}")
    return promotion


def propose(
    uri: str,
    policy_uri: str,
    content_digest: str,
    *,
    evaluated: str,
    iteration: int,
    incumbent: str | None = None,
    evidence: Evidence | None = None,
) -> None:
    """Keep in the history that a policy may be promoted; the pointer stays, and a person decides (`dice promote`).

    See promote for the arguments and errors.
    """
    pointer = _Pointer.read(uri)
    if pointer.promotion and pointer.promotion.content_digest == content_digest:
        return
    pointer.require_incumbent(incumbent, policy_uri)
    promotion = Promotion(policy_uri, content_digest, evaluated, iteration)
    pointer.keep(replace(pointer.step(promotion, evidence or Evidence()), how="proposal"))
    log(f"proposed: {policy_uri} waits for `dice promote --pointer {uri}`")


def roll_back(uri: str, sequence: int | None = None, *, by: str = "", reason: str = "") -> Entry:
    """Let the pointer say again, byte for byte, what it said before, and keep that in the history.

    Args:
        uri: of the pointer.
        sequence: number of the entry to go back to; None: what was in effect before the current policy was promoted.
        by: who.
        reason: why.

    Returns:
        The entry that was gone back to.

    Raises:
        UnfitError: there is no such entry, it was never in effect, or its policy is gone or another by now.
        ConflictError: somebody else moved the pointer at the same moment.
    """
    pointer = _Pointer.read(uri)
    target = _target(pointer, sequence)
    policy = _parse(target.pointer.encode(), uri)
    require_content(policy.policy_uri, policy.content_digest, f"entry {target.sequence} of {uri}")
    evidence = Evidence(how="rollback", by=by, reason=reason, registered_model=target.registered_model)
    step = pointer.step(policy, evidence)
    pointer.move(replace(step, pointer=target.pointer, verdict=target.verdict))
    log(f"rolled back: {uri} now points to {policy.policy_uri}, as after entry {target.sequence}")
    return target


def require_content(policy_uri: str, content_digest: str, said_by: str) -> None:
    """Check that a policy is there and still is the one that was promoted.

    Raises:
        UnfitError: it is not.
    """
    manifest = require_manifest(policy_uri)
    if manifest.skipped:
        raise UnfitError(f"{policy_uri}: holds no model: its stage was skipped ({manifest.skipped})")
    if manifest.content_digest != content_digest:
        raise UnfitError(
            f"{policy_uri}: not the policy that was promoted (content {manifest.content_digest[:12]}, {said_by} says "
            f"{content_digest[:12]}): it was made anew since; `dice rollback` goes back to another one, `dice promote` "
            "takes this one once it is evaluated"
        )


def _target(pointer: "_Pointer", sequence: int | None) -> Entry:
    """Return the entry to go back to."""
    history = pointer.history()
    if sequence is None:
        if history.previous is None:
            raise UnfitError(
                f"{history.uri}: its history knows of nothing before what it says now: `dice history` shows the "
                "entries, --to takes one"
            )
        return history.previous
    target = history.entry(sequence)
    if not target.pointer or history.states()[sequence] == "never in effect":
        raise UnfitError(f"{history.uri}: entry {sequence} was never in effect: `dice promote` promotes its policy")
    if target.pointer == pointer.text:
        raise UnfitError(f"{history.uri}: already says what entry {sequence} wrote")
    return target


@dataclass(frozen=True)
class _Pointer:
    """A pointer as it was read, and the conditional writes that follow from that."""

    uri: str
    text: str | None
    version: str | None
    promotion: Promotion | None

    @classmethod
    def read(cls, uri: str) -> "_Pointer":
        storage, name = _place(uri)
        found = storage.read_versioned(name)
        if found is None:
            return cls(uri, None, None, None)
        promotion = _parse(found[0], uri)
        return cls(uri, found[0].decode(), found[1], promotion)

    def history(self) -> History:
        return read_history(self.uri, self.text)

    def require_incumbent(self, incumbent: str | None, policy_uri: str) -> None:
        current = self.promotion.content_digest if self.promotion else ""
        if incumbent is not None and incumbent != current:
            named = self.promotion.policy_uri if self.promotion else "no policy"
            raise MovedError(
                f"{self.uri}: names {named} by now, which {policy_uri} was not measured against: it is not promoted; "
                "evaluate it against that (another output, or --overwrite)"
            )

    def step(self, promotion: Promotion, evidence: Evidence) -> Entry:
        """Return the entry of a step from what the pointer says to a policy; its number comes when it is kept."""
        run = layout.run_of(promotion.evaluated) or layout.run_of(promotion.policy_uri)
        return Entry(
            how=evidence.how,
            time=now(),
            by=evidence.by or (f"run {run}, iteration {promotion.iteration}" if run else ""),
            policy_uri=promotion.policy_uri,
            content_digest=promotion.content_digest,
            replaced_uri=self.promotion.policy_uri if self.promotion else "",
            replaced_digest=self.promotion.content_digest if self.promotion else "",
            evaluated=promotion.evaluated,
            verdict=flat(evidence.verdict or {}),
            run=run,
            iteration=promotion.iteration,
            is_forced=evidence.is_forced,
            reason=evidence.reason,
            registered_model=evidence.registered_model,
            before=digest(self.text),
        )

    def keep(self, step: Entry) -> Entry:
        """Write the entry of a step, unless an attempt of it that was interrupted has; return the one that counts."""
        history = self.history()
        if history.entries and history.entries[-1].is_same_step(step):
            return history.entries[-1]
        number = history.next_sequence
        if self.promotion and not history.is_complete:
            # So that it can be gone back to.
            found = self.step(self.promotion, Evidence(how="found", by=f"version {self.promotion.package_version}"))
            append(self.uri, replace(found, sequence=number, pointer=self.text or "", before=""))
            number += 1
        entry = replace(step, sequence=number)
        append(self.uri, entry)
        return entry

    def move(self, step: Entry) -> None:
        """Keep a step, then write the pointer. Killed in between, it is done by the next attempt of the same step."""
        entry = self.keep(step)
        storage, name = _place(self.uri)
        try:
            storage.write_if_version(name, entry.pointer.encode(), self.version)
        except ConflictError:
            raise ConflictError(
                f"{self.uri}: not moved to {step.policy_uri}: somebody else moved it at the same moment: look at "
                "`dice history`, and promote again if that still is right"
            ) from None


def _place(uri: str) -> tuple[Storage, str]:
    parent, _, name = uri.rpartition("/")
    return open_storage(parent or "."), name


def _parse(data: bytes, uri: str) -> Promotion:
    try:
        promotion = read_record(Promotion, data, uri)
    except ValueError as error:
        raise StorageError(f"{uri}: not a pointer to a promoted policy: {error}") from None
    if not promotion.policy_uri or not promotion.content_digest:
        raise StorageError(f"{uri}: not a pointer to a promoted policy: it names none")
    return promotion

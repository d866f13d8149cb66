"""Command promote: a person points to a policy, on the evidence of its evaluation or, with a reason, against it."""

from dice_core.commands.person import person
from dice_core.commands.table import Answer
from dice_core.release.evaluated import Evaluated, find_evaluation, read_evaluation, require_model
from dice_core.release.mlflow_registry import register_or_tell
from dice_core.settings.base import ConfigError
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest
from dice_core.storage.promotion import Evidence, read_promotion, read_promotion_history
from dice_core.storage.promotion import promote as move


def promote(
    pointer_uri: str,
    *,
    policy_uri: str = "",
    evaluation_uri: str = "",
    reference_uri: str = "",
    force: bool = False,
    reason: str = "",
) -> Answer:
    """Point to a policy: by default the one that a run with evaluation.promote=manual has proposed last.

    Args:
        pointer_uri: the pointer to move, ROOT/promoted/NAME.json.
        policy_uri: the policy; by default the open proposal.
        evaluation_uri: the evaluation that names it; by default the one beside it in its run.
        reference_uri: what the policy was trained from, which a recurring run needs; by default as its run says.
        force: promote it although its evaluation does not say so, or although there is none; needs --reason.
        reason: why, for the history.
    """
    if force and not reason.strip():
        raise ConfigError("--force: needs --reason, which the history keeps")
    if not policy_uri:
        policy_uri, evaluation_uri = _proposed(pointer_uri, evaluation_uri)
    manifest = require_model(policy_uri)
    evaluated = read_evaluation(evaluation_uri) if evaluation_uri else find_evaluation(policy_uri)
    if evaluated:
        evaluated.require_of(policy_uri, manifest)
    before = read_promotion(pointer_uri)
    current_digest = before.content_digest if before else ""
    against = _against(evaluated, current_digest)
    if against and not force:
        raise UnfitError(f"{policy_uri}: not promoted: {against}; --force --reason TEXT promotes it all the same")
    promotion = move(
        pointer_uri,
        policy_uri,
        manifest.content_digest,
        evaluated=evaluated.uri if evaluated else "",
        iteration=evaluated.iteration if evaluated else int(manifest.settings.get("iteration", 0)),
        reference_uri=reference_uri or (evaluated.previous_uri if evaluated else _trained_from(manifest)),
        incumbent=current_digest,
        evidence=Evidence(
            verdict=evaluated.verdict if evaluated else None,
            how="manual",
            by=person(),
            is_forced=bool(against),
            reason=reason,
        ),
    )
    was_there = before is not None and before.content_digest == promotion.content_digest
    text = f"{pointer_uri} {'already named' if was_there else 'names'} {promotion.policy_uri}"
    registry = register_or_tell(pointer_uri)
    values = vars(promotion) | {"pointer": pointer_uri, "changed": not was_there, "registry": registry}
    return Answer(text, values)


def _proposed(pointer_uri: str, evaluation_uri: str) -> tuple[str, str]:
    """Return the policy that waits for a person, and the evaluation that proposed it."""
    proposal = read_promotion_history(pointer_uri).open_proposal()
    if proposal is None:
        raise UnfitError(f"{pointer_uri}: no proposal is open, `dice history` shows them: give --policy")
    return proposal.policy_uri, evaluation_uri or proposal.evaluated


def _against(evaluated: Evaluated | None, current_digest: str) -> str:
    """Return what speaks against promoting a policy; empty: nothing does."""
    if evaluated is None:
        return "no evaluation names it, run `dice evaluate` or give --evaluation"
    if not evaluated.is_promotable:
        what = "does not show that it is better" if evaluated.is_accepted else "refused it"
        return f"{evaluated.uri} {what} ({evaluated.reason})"
    # Where nothing is promoted yet, there is nothing to be better than.
    if current_digest and evaluated.incumbent_digest not in (None, current_digest):
        return f"{evaluated.uri} compared it with another policy than the pointer names"
    return ""


def _trained_from(manifest: Manifest) -> str:
    """Return the reference of a policy's implicit reward; empty for a model that no run has trained."""
    return manifest.inputs.get("policy", "").rpartition("@")[0]

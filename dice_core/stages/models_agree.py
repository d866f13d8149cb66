"""Whether the models that a stage compares belong together: one tokenizer, and not the same weights twice.

A manifest says it by digests. For models that an earlier version made the tokenizers themselves are compared.
"""

from dice_core.progress import log
from dice_core.stages.runner import StageContext
from dice_core.storage.contract import UnfitError


def require_one_tokenizer(context: StageContext, policy: str, others: tuple[str, ...]) -> None:
    """Check that token ids of the policy mean the same to other models of a stage.

    Args:
        context: of the stage; all of these are inputs.
        policy: name of the input whose tokenizer made the ids.
        others: names of the inputs that get these ids.

    Raises:
        UnfitError: a tokenizer is another one, so that log-probs would be those of other texts.
    """
    ours = context.inputs[policy].manifest
    for name in others:
        theirs = context.inputs[name].manifest
        if theirs.content_digest == ours.content_digest:
            continue
        known = (ours.text_digests.get("tokenizer"), theirs.text_digests.get("tokenizer"))
        if known[0] is None or known[0] != known[1]:
            _compare_tokenizers(context, policy, name)
        templates = (ours.text_digests.get("chat_template"), theirs.text_digests.get("chat_template"))
        if None not in templates and templates[0] != templates[1]:
            stage = context.manifest_fields["stage"]
            log(f"{stage}: {policy} and {name} have different chat templates; prompts are those of the {policy}")


def _compare_tokenizers(context: StageContext, policy: str, other: str) -> None:
    from dice_core.models.loading import load_tokenizer
    from dice_core.models.tokenizers import disagreement

    ours, theirs = (load_tokenizer(context.fetch_tokenizer(name)) for name in (policy, other))
    if reason := disagreement(ours, theirs):
        raise UnfitError(
            f"{context.inputs[other].uri}: its tokenizer is not that of the {policy} {context.inputs[policy].uri} "
            f"({reason}): give a {other.replace('_', ' ')} with the same tokenizer"
        )


def require_other_weights(context: StageContext, policy: str, other: str) -> None:
    """Check that two models have different weights.

    Raises:
        UnfitError: they are the same, so there is no way from one to the other.
    """
    if _have_same_weights(context, policy, other):
        raise UnfitError(
            f"{context.inputs[other].uri}: has the weights of the {policy} {context.inputs[policy].uri}: give the "
            f"model that the {policy} was trained from"
        )


def tell_same_weights(context: StageContext, policy: str, reference: str) -> None:
    """Say so in the log if policy and reference are the same weights: all rewards are then 0.

    It is no error: a warm start may have moved nothing, and offline pairs do not depend on rewards.
    """
    if _have_same_weights(context, policy, reference):
        log(
            f"{context.manifest_fields['stage']}: warning: {policy} and {reference} are the same weights, so every "
            f"reward is 0 and pairs would be chosen by length alone: the {reference} should be the model before the "
            f"{policy}"
        )


def _have_same_weights(context: StageContext, one: str, other: str) -> bool:
    ours, theirs = (
        {entry.sha256 for name, entry in context.inputs[role].manifest.files.items() if _is_weights(name)}
        for role in (one, other)
    )
    return ours == theirs


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")

"""What follows from an evaluation: the pointer moves or a person is asked; a registry and the model's card tell.

The gate has decided (evaluation/gate.py); storage/promotion.py moves the pointer. A stage calls this each time it runs,
also for a decision that an earlier attempt has stored: each step is made once.
"""

from collections.abc import Callable, Mapping
from functools import partial

from dice_core.evaluation.settings import EvaluationConfig
from dice_core.progress import log
from dice_core.release.evaluated import Evaluated
from dice_core.release.mlflow_registry import register_or_tell
from dice_core.release.model_card import update_card
from dice_core.stages.runner import Input
from dice_core.storage.manifest import Metric
from dice_core.storage.promotion import Evidence, MovedError, promote, propose


def settle(
    policy: Input,
    *,
    evaluated_uri: str,
    previous_uri: str,
    incumbent: str | None,
    iteration: int,
    verdict: Mapping[str, Metric],
    is_promotable: bool,
    promoted_uri: str,
    config: EvaluationConfig,
) -> str:
    """Promote or propose a policy that is to be promoted, and describe it beside its weights.

    Args:
        policy: that was evaluated.
        evaluated_uri: the evaluation.
        previous_uri: what the policy was trained from: the reference of a run that starts from it.
        incumbent: content digest of the promoted policy that it was compared with, empty for none; None: any.
        iteration: of the policy.
        verdict: the evaluation's numbers, flat.
        is_promotable: what the gate says.
        promoted_uri: the pointer; empty: none.
        config: promote and registered_model are read.

    Returns:
        What became of it: `promoted`, `proposed`, or `not promoted`, with the reason.

    Raises:
        ConflictError: another run promoted at the same moment; running the stage again decides anew.
    """
    outcome = "not promoted: the gate does not say so" if promoted_uri else "not promoted: the run moves no pointer"
    if promoted_uri and is_promotable:
        is_automatic = config.promote == "auto"
        step: Callable[..., object] = partial(promote, reference_uri=previous_uri) if is_automatic else propose
        try:
            step(
                promoted_uri,
                policy.uri,
                policy.manifest.content_digest,
                evaluated=evaluated_uri,
                iteration=iteration,
                incumbent=incumbent,
                evidence=Evidence(verdict=verdict, registered_model=config.registered_model),
            )
            outcome = "promoted" if is_automatic else "proposed"
            register_or_tell(promoted_uri)
        except MovedError as error:
            outcome = f"not promoted: {error}"
            log(f"evaluate: {error}")
    found = Evaluated(evaluated_uri, policy.manifest.content_digest, previous_uri, incumbent, iteration, verdict)
    update_card(policy.uri, found)
    return outcome

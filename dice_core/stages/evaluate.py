"""Stage evaluate: measure the new policy, decide, and point to it where people look for the last good one."""

import json
from functools import partial

from dice_core.data import records
from dice_core.data.settings import ChatConfig
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.settings.base import Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.models_agree import require_one_tokenizer
from dice_core.stages.parts import read_input
from dice_core.stages.place import Artifact, show
from dice_core.stages.promoting import settle
from dice_core.stages.run_settings import read_task
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import EVALUATE
from dice_core.storage import layout
from dice_core.storage.manifest import Manifest
from dice_core.storage.promotion import require_promotable

_RESULT = "evaluation.json"


@leaves_reason(EVALUATE)
def evaluate(
    policy_uri: str,
    previous_uri: str,
    base_reference_uri: str,
    data_uri: str,
    output_uri: str,
    *,
    iteration: int = 1,
    promoted_uri: str = "",
    evaluation: Values = None,
    generation: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Measure the new policy against the one before it; move the promoted pointer only if it is accepted and better.

    Args:
        policy_uri: the new policy, pi_t.
        previous_uri: the policy before it, pi_{t-1}.
        base_reference_uri: first reference of the run, for the held-out rewards of both policies.
        data_uri: prepare-data's output (held_out.parquet).
        output_uri: where evaluation.json goes.
        iteration: number of the iteration, from 1.
        promoted_uri: JSON pointer to move if the policy is accepted and better; none by default.
        evaluation: settings, see EvaluationConfig.
        generation: GenerationConfig: answers are sampled as in generate.
        chat: settings, see ChatConfig.
        seed: seed of the run.
        overwrite: first delete what this stage left at its output.
    """
    layout.check_count(iteration, "iteration")
    evaluation_config = EvaluationConfig.parse(evaluation, "evaluation")
    generation_config, chat_config = GenerationConfig.parse(generation, "generation"), ChatConfig.parse(chat, "chat")
    work = partial(
        _measure_and_promote,
        seed=EVALUATE.seed(seed, iteration),
        iteration=iteration,
        promoted_uri=promoted_uri,
        evaluation=evaluation_config,
        generation=generation_config,
        chat=chat_config,
    )
    return run_stage(
        EVALUATE,
        output_uri,
        work,
        settings={"evaluation": evaluation_config, "generation": generation_config, "chat": chat_config},
        arguments={"seed": seed, "iteration": iteration, "promoted_uri": promoted_uri},
        overwrite=overwrite,
        inputs={
            "policy": policy_uri,
            "previous": previous_uri,
            "base_reference": base_reference_uri,
            "data": data_uri,
        },
    )


def _measure_and_promote(
    context: StageContext,
    *,
    evaluation: EvaluationConfig,
    generation: GenerationConfig,
    chat: ChatConfig,
    seed: int,
    iteration: int,
    promoted_uri: str,
) -> Manifest:
    """Measure the new policy, decide, and point to it where people look for the last good one."""
    from dice_core.evaluation.measuring import evaluate_policy
    from dice_core.models.cache import fetch_model

    if _RESULT not in context.parts:
        require_one_tokenizer(context, "policy", ("previous", "base_reference"))
        if promoted_uri:
            require_promotable(promoted_uri)
        held_out = read_input(context, context.inputs["data"], records.PREFERENCES, "held_out")
        names = ("policy", "previous", "base_reference")
        new, previous, base_reference = (fetch_model(context.inputs[name].uri) for name in names)
        result = evaluate_policy(
            new,
            previous,
            base_reference,
            held_out,
            evaluation=evaluation,
            chat=chat,
            generation=generation,
            seed=seed,
        )
        values = {**result.to_dict(), "promotable": result.promotable, "seconds": context.seconds()}
        # Stored before the pointer moves: another attempt finds this decision, and does not measure again.
        context.publish_part(_RESULT, context.write_json(values, _RESULT))
    key = context.parts[_RESULT].key
    values = json.loads(context.stored.fetch(context.folder / "part", [key])[key].read_text())
    settle(
        context.inputs["policy"],
        evaluated_uri=context.uri,
        previous_uri=context.inputs["previous"].uri,
        incumbent=None,
        iteration=iteration,
        verdict=values["metrics"],
        is_promotable=values["promotable"],
        promoted_uri=promoted_uri,
        config=evaluation,
    )
    return context.publish({}, {**values["metrics"], "seconds": values["seconds"]})


def evaluate_task(
    run_uri: str,
    settings_uri: str,
    place: str,
    policy_uri: str,
    previous_uri: str,
    base_reference_uri: str,
    data_uri: str,
    metrics: Artifact,
) -> tuple[str, str]:
    """Evaluate the policy of an iteration, as a task of a pipeline; see evaluate.

    Returns:
        The address of the evaluation, and `accepted` or `refused`; the latter of a policy that was never made too.
    """
    task = read_task(run_uri, settings_uri, place)
    pointer = task.plan["promote_as"]
    report = evaluate(
        policy_uri,
        previous_uri,
        base_reference_uri,
        data_uri,
        task.uri,
        iteration=task.place.iteration or 0,
        promoted_uri=layout.promoted(task.root, pointer) if pointer else "",
        seed=task.plan["seed"],
        **task.settings(EVALUATE),
    )
    return show(report, task.place, metrics), "accepted" if report.metrics.get("accepted") else "refused"

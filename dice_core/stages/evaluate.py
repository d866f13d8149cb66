"""Stage evaluate: measure the new policy, decide, and point to it where people look for the last good one.

What it is compared with is read from the promoted pointer once, when the stage begins, and kept: a retry compares with
the same model. evaluation_steps.py measures, promoting.py does what follows.
"""

import json
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from dice_core.data.settings import ChatConfig
from dice_core.evaluation.result import SHOWN, ComparedWith
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.judges.settings import JudgingConfig
from dice_core.progress import log
from dice_core.settings.base import ConfigError, Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.judge_models import JUDGE
from dice_core.stages.place import Artifact, show
from dice_core.stages.promoting import settle
from dice_core.stages.run_settings import read_task
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import EVALUATE
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest
from dice_core.storage.promotion import read_promotion, require_promotable
from dice_core.storage.stored_record import read_record

_RESULT = "evaluation.json"
_INCUMBENT = "incumbent.json"
COMPARED_WITH = "compared_with"
"""Where a manifest says what the policy was compared with, and why with that."""


@leaves_reason(EVALUATE)
def evaluate(
    policy_uri: str,
    previous_uri: str,
    base_reference_uri: str,
    data_uri: str,
    output_uri: str,
    *,
    iteration: int = 1,
    first_uri: str = "",
    incumbent_uri: str = "",
    judge_uri: str = "",
    promoted_uri: str = "",
    earlier_uri: str = "",
    evaluation: Values = None,
    judging: Values = None,
    generation: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Compare the new policy with the promoted one; promote it only if it is better and breaks no guard.

    Args:
        policy_uri: the new policy, pi_t.
        previous_uri: the policy before it, pi_{t-1}.
        base_reference_uri: first reference of the run, for the held-out rewards of all policies.
        data_uri: prepare-data's output (held_out.parquet).
        output_uri: where evaluation.json goes.
        iteration: number of the iteration, from 1.
        first_uri: first policy of the run, from which drift is measured; by default the previous one.
        incumbent_uri: what the policy is compared with; by default what promoted_uri points to, and the first policy
            while nothing is promoted.
        judge_uri: the model of judging.judge, where that is one.
        promoted_uri: JSON pointer to move if the policy is better and breaks no guard; none by default.
        earlier_uri: the evaluation before: what it has sampled from and scored with the same models is taken.
        evaluation: settings, see EvaluationConfig.
        judging: settings, see JudgingConfig.
        generation: GenerationConfig: answers are sampled as in generate.
        chat: settings, see ChatConfig.
        seed: seed of the run.
        overwrite: first delete what this stage left at its output.
    """
    layout.check_count(iteration, "iteration")
    judging_config = JudgingConfig.parse(judging, "judging")
    sections: dict[str, Any] = {
        "evaluation": EvaluationConfig.parse(evaluation, "evaluation"),
        "judging": judging_config,
        "generation": GenerationConfig.parse(generation, "generation"),
        "chat": ChatConfig.parse(chat, "chat"),
    }
    has_model = _has_judge_model(judging_config, judge_uri)
    first_uri = first_uri or previous_uri
    compared_with = _compared_with(output_uri, incumbent_uri, promoted_uri, first_uri, anew=overwrite)
    inputs = {
        "policy": policy_uri,
        "previous": previous_uri,
        "base_reference": base_reference_uri,
        "first": first_uri,
        "incumbent": compared_with.uri,
        "data": data_uri,
    }
    return run_stage(
        EVALUATE,
        output_uri,
        partial(
            _measure_and_promote,
            compared_with=compared_with,
            earlier_uri=earlier_uri,
            # Not of the iteration: a prompt is answered with the same random numbers in all of them.
            seed=EVALUATE.seed(seed),
            iteration=iteration,
            **sections,
        ),
        settings=sections,
        arguments={"seed": seed, "iteration": iteration, "promoted_uri": promoted_uri},
        overwrite=overwrite,
        inputs=inputs | ({"judge": judge_uri} if has_model else {}),
        noted={COMPARED_WITH: asdict(compared_with)},
    )


def _has_judge_model(judging: JudgingConfig, judge_uri: str) -> bool:
    """Return whether the judge is a model of this suite's storage.

    Raises:
        ConfigError: it is, and its address is not given.
    """
    has_model = judging.judge in ("reward-model", "chat-logprob")
    if has_model and not judge_uri:
        raise ConfigError(
            f"judging.judge: is {judging.judge}, and no model of it was given: name its source (judge_source, or "
            "--judge of `dice evaluate`), or set judging.judge=none"
        )
    return has_model


def _compared_with(output_uri: str, given_uri: str, promoted_uri: str, first_uri: str, *, anew: bool) -> ComparedWith:
    """Return what the policy is compared with: as it was chosen before, or as the promoted pointer says now."""
    if given_uri:
        return ComparedWith(given_uri, "given model", promoted_uri)
    kept = None if anew else open_storage(output_uri).read_versioned(_INCUMBENT)
    if kept:
        try:
            chosen = read_record(ComparedWith, kept[0], layout.join(output_uri, _INCUMBENT))
        except ValueError as error:
            raise StorageError(f"{layout.join(output_uri, _INCUMBENT)}: says not what was compared: {error}") from None
        # A pointer of another name is another setting, which the runner names.
        if chosen.promoted_uri == promoted_uri:
            return chosen
    promotion = read_promotion(promoted_uri) if promoted_uri else None
    if promotion is None:
        return ComparedWith(first_uri, "first policy", promoted_uri)
    return ComparedWith(promotion.policy_uri, "promoted model", promoted_uri, promotion.content_digest)


def _measure_and_promote(
    context: StageContext,
    *,
    compared_with: ComparedWith,
    earlier_uri: str,
    evaluation: EvaluationConfig,
    judging: JudgingConfig,
    generation: GenerationConfig,
    chat: ChatConfig,
    seed: int,
    iteration: int,
) -> Manifest:
    """Measure the new policy, decide, and point to it where people look for the last good one."""
    from dice_core.stages.evaluation_steps import EvaluationPlan, measure

    pointer = compared_with.promoted_uri
    _require_unchanged(context, compared_with)
    if _RESULT not in context.parts:
        if pointer:
            require_promotable(pointer)
        # A retry finds it, and compares with the same.
        open_storage(context.uri).write_bytes(_INCUMBENT, json.dumps(asdict(compared_with), indent=1).encode())
        log(f"evaluate: compares with {compared_with.uri}, the {compared_with.what}")
        plan = EvaluationPlan(evaluation, judging, generation, chat, seed, earlier_uri)
        result = measure(context, plan)
        values = {**result.to_dict(compared_with), "seconds": context.seconds()}
        # Stored before the pointer moves: another attempt finds this decision, and does not measure again.
        context.publish_part(_RESULT, context.write_json(values, _RESULT))
    key = context.parts[_RESULT].key
    values = json.loads(context.stored.fetch(context.folder / "part", [key])[key].read_text())
    gate = values["gate"]
    power = [gate["power"]] if gate["power"] and gate["power"] not in gate["reason"] else []
    for said in (gate["reason"], *power, *gate["warnings"]):
        log(f"evaluate: {said}")
    outcome = settle(
        context.inputs["policy"],
        evaluated_uri=context.uri,
        previous_uri=context.inputs["previous"].uri,
        incumbent=_expected(context, compared_with),
        iteration=iteration,
        verdict=values["metrics"],
        is_promotable=bool(gate["promotable"]),
        promoted_uri=pointer,
        config=evaluation,
    )
    return context.publish({}, {**values["metrics"], "promotion": outcome, "seconds": values["seconds"]})


def _require_unchanged(context: StageContext, compared_with: ComparedWith) -> None:
    """Check that the promoted policy still is the one that was promoted.

    Raises:
        StorageError: it was made anew since.
    """
    found = context.inputs["incumbent"].manifest.content_digest
    if compared_with.promoted_digest and found != compared_with.promoted_digest:
        raise StorageError(
            f"{compared_with.uri}: not the policy that was promoted (content {found[:12]}, "
            f"{compared_with.promoted_uri} says {compared_with.promoted_digest[:12]}): it was made anew since; "
            "`dice rollback` points to another"
        )


def _expected(context: StageContext, compared_with: ComparedWith) -> str:
    """Return the content digest that the pointer must name, so that what it names was compared; empty: none."""
    if compared_with.what == "given model" and compared_with.promoted_uri:
        return context.inputs["incumbent"].manifest.content_digest if read_promotion(compared_with.promoted_uri) else ""
    return compared_with.promoted_digest


def evaluate_task(settings_uri: str, place: str, metrics: Artifact) -> tuple[str]:
    """Evaluate the policy of an iteration, as a task of a pipeline; see evaluate.

    Returns:
        `accepted` or `refused`; the latter of a policy that was never made too.
    """
    task = read_task(settings_uri, place)
    pointer = task.plan["promote_as"]
    report = evaluate(
        task.policy_uri(task.iteration),
        task.policy_uri(task.iteration - 1),
        task.policy_uri(-1),
        task.data_uri,
        task.uri,
        iteration=task.iteration,
        first_uri=task.policy_uri(0),
        judge_uri=task.judge_uri(JUDGE),
        promoted_uri=layout.promoted(task.root, pointer) if pointer else "",
        earlier_uri=task.gate_uri,
        seed=task.plan["seed"],
        **task.settings(EVALUATE),
    )
    show(_at_a_glance(report), task.place, metrics)
    return ("accepted" if report.metrics.get("accepted") else "refused",)


def _at_a_glance(report: StageReport) -> StageReport:
    """Return the report with the numbers for KFP's table alone; those that are not known are left out."""
    shown: dict[str, Any] = {name: report.metrics[name] for name in SHOWN if name in report.metrics}
    return replace(report, metrics=shown)

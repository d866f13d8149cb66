"""Stage evaluate: measure the new policy, decide, and point to it where people look for the last good one.

What it is compared with is read from the promoted pointer once, when the stage begins, and kept: a retry compares with
the same model. evaluation_steps.py measures.
"""

import json
from dataclasses import asdict, replace
from functools import partial

from dice_core.data.settings import ChatConfig
from dice_core.evaluation.result import SHOWN, ComparedWith
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.judges.settings import JudgingConfig
from dice_core.progress import log
from dice_core.settings.base import ConfigError, Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.place import Artifact, show
from dice_core.stages.run_settings import read_task
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import EVALUATE
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import ConflictError, StorageError
from dice_core.storage.manifest import Manifest, Metric, require_manifest
from dice_core.storage.promotion import promote, read_promotion, require_promotable
from dice_core.storage.stored_record import read_record

_RESULT = "evaluation.json"
_INCUMBENT = "incumbent.json"


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
    """Compare the new policy with the promoted one; move the promoted pointer only if it is better and breaks no guard.

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
        judge_uri: the model of judging.judge, if that is one.
        promoted_uri: JSON pointer to move if the policy is better and breaks no guard; none by default.
        earlier_uri: the evaluation of the iteration before; what it has sampled and scored of the same models is taken.
        evaluation: settings, see EvaluationConfig.
        judging: settings, see JudgingConfig.
        generation: GenerationConfig: answers are sampled as in generate.
        chat: settings, see ChatConfig.
        seed: seed of the run.
        overwrite: first delete what this stage left at its output.
    """
    layout.check_count(iteration, "iteration")
    sections = {
        "evaluation": EvaluationConfig.parse(evaluation, "evaluation"),
        "judging": JudgingConfig.parse(judging, "judging"),
        "generation": GenerationConfig.parse(generation, "generation"),
        "chat": ChatConfig.parse(chat, "chat"),
    }
    _require_judge(sections["judging"], judge_uri)
    first_uri = first_uri or previous_uri
    compared_with = _incumbent(output_uri, incumbent_uri, promoted_uri, first_uri, anew=overwrite)
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
        inputs={
            "policy": policy_uri,
            "previous": previous_uri,
            "base_reference": base_reference_uri,
            "first": first_uri,
            "incumbent": compared_with.uri,
            "data": data_uri,
            **({"judge": judge_uri} if judge_uri else {}),
        },
    )

"""The DICE pipeline of a preset: iterations and shards unrolled when it is compiled.

    check settings -> import-model -> prepare-data -> [warm start: pair -> train] -> iteration 1 -> iteration 2 ...
    iteration: generate and score (one task a shard) -> pair -> train -> evaluate
               offline pairs alone (replay_ratio 1): pair -> train -> evaluate
    report: at the end, whatever happened
    a recurring run chooses its name, policy, reference and prompts first

A person may edit every setting of a stage in the UI: they are parameters, a JSON object per stage. check-settings
writes them to one file, whose address the other tasks get. By it, and by its place in the run, a task finds what it
reads (dice_core.stages.run_settings); the graph says what it waits for. How many iterations and shards there are, and
whether anything is sampled, decides the graph: that is fixed at compile time. What a gate decides is read by the stages
themselves, so that the pipeline runs the same where conditions are not supported; on a cluster a condition saves the
pods of the iterations after a refused policy as well.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.python_component import PythonComponent

from components.check_settings import check_settings
from components.choose_inputs import choose_inputs
from components.evaluate import evaluate
from components.generate_and_score import generate_and_score
from components.import_model import import_model
from components.pair import pair
from components.prepare_data import prepare_data
from components.report import report
from components.train import train
from dice_core.settings.base import Settings
from dice_core.stages.judge_models import JUDGE, REWARD
from dice_core.stages.place import WARM_START, Place
from dice_core.stages.table import (
    CHECK_SETTINGS,
    CHOOSE_INPUTS,
    EVALUATE,
    GENERATE_AND_SCORE,
    IMPORT_MODEL,
    PAIR,
    PREPARE_DATA,
    REPORT,
    STAGES,
    TRAIN,
)
from pipelines.cluster.config import PIPELINE_ACCOUNT
from pipelines.cluster.resources import configure_task
from pipelines.cluster.training_pods import training_pods
from pipelines.presets import Preset

DESCRIPTIONS = {
    "root": "Where all runs keep their data: s3://bucket/prefix.",
    "run": "Name of this run; empty: a fresh one, of promote_as and the run's id. The same name again continues a run.",
    "judge_source": "Model that compares the answers of two policies, where judging.judge is one.",
    "reward_source": "Model that ranks the responses to train on, where scoring.reward is one.",
    "policy_source": "The policy to start from: a Hub id, a folder, an s3:// address or a GGUF file.",
    "reference_source": "What the policy's own DPO started from.",
    "preferences_source": "Offline preference pairs: JSONL, Parquet or a Hub data set.",
    "prompts_source": "Prompts to generate on; empty: those of the preference pairs.",
    "exclude_source": "Prompts of benchmarks to leave out; may be empty.",
    "promote_as": "Name of the promoted pointer that an accepted, better policy moves; empty: none.",
    "seed": "Every random choice follows from it.",
    "chat": "How a prompt becomes token ids (ChatConfig).",
    "data": "Preparing data (DataConfig).",
    "generation": "Sampling (GenerationConfig).",
    "scoring": "Valid responses, their log-probs, and what ranks them (ScoringConfig).",
    "grading": "How a reward model or a judge grades responses, where scoring.reward is one (GradingConfig).",
    "pairing": "Length penalty, selection, replay (PairingConfig).",
    "training": "DPO (TrainingConfig).",
    "warm_start_training": "DPO of the first policy on offline pairs (TrainingConfig).",
    "evaluation": "What is measured of a new policy, when it is accepted, and when it is better (EvaluationConfig).",
    "judging": "Who compares the answers of two policies (JudgingConfig).",
    "launch": "Which processes train (LaunchConfig).",
}

_SETTINGS = "settings_uri"
"""Of every task behind check-settings: what the run was started with, and by its place where the run is."""
_DATA_SOURCES = ("preferences_source", "prompts_source", "exclude_source")
_ROLES = (JUDGE, REWARD)
"""Of models that only presets with a source of theirs import."""

ACCEPTED = "accepted"
"""What component evaluate says of a policy with which the next iteration goes on."""

Given = Mapping[str, Any]
"""Inputs of a pipeline by name: the placeholders that kfp wires to tasks."""


class IterationOutputs(NamedTuple):
    """What an iteration tells the next one."""

    decision: str


def build_pipeline(preset: Preset, *, recurring: bool = False) -> GraphComponent:
    """Return the pipeline of a preset; kfp compiles it, or runs it here when it is called with kfp.local.

    Args:
        preset: decides the graph, the defaults of the parameters, and what tasks get on a cluster.
        recurring: the pipeline chooses its inputs when it runs: a name of its own, the last promoted policy, the
            newest prompts. `run` is then what the names begin with.
    """
    iterations = [build_iteration(iteration, preset) for iteration in range(1, preset.iterations + 1)]

    def run_all(given: Given) -> None:
        names = {"run": "", "schedule": given["run"]} if recurring else {"run": given["run"], "schedule": ""}
        page = report(
            **_take(given, "root", "promote_as"),
            **names,
            job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            num_iterations=preset.iterations,
        )
        with dsl.ExitHandler(configure_task(page, REPORT, "report", preset), name=preset.name):
            _run_stages(preset, iterations, _choose_inputs(preset, given) if recurring else given, recurring)

    defaults = default_parameters(preset, recurring=recurring)
    inputs = [_parameter("root", str), *(_parameter(name, type(value), value) for name, value in defaults.items())]
    name = f"dice-{preset.name}" + ("-recurring" if recurring else "")
    display_name = f"DICE {preset.name}" + (", recurring" if recurring else "")
    return _pipeline(run_all, name, display_name, inputs, description=preset.description)


def build_iteration(iteration: int, preset: Preset) -> GraphComponent:
    """Return the pipeline of one iteration: from a policy and the one before it to the next policy, measured."""

    def run_iteration(given: Given) -> IterationOutputs:
        settings_uri, num_shards = given[_SETTINGS], num_sampling_tasks(preset)
        places = [Place(GENERATE_AND_SCORE.name, iteration, shard, num_shards) for shard in range(num_shards)]
        scored = [_start(preset, place, generate_and_score, settings_uri) for place in places]
        trained = _pair_and_train(preset, iteration, settings_uri, scored)
        measured = _start(preset, Place(EVALUATE.name, iteration), evaluate, settings_uri, trained)
        return IterationOutputs(measured.outputs["decision"])

    inputs = [_parameter(_SETTINGS, str)]
    name = f"iteration {iteration}"
    return _pipeline(run_iteration, name.replace(" ", "-"), name, inputs, outputs=IterationOutputs)


def default_parameters(preset: Preset, *, recurring: bool = False) -> dict[str, Any]:
    """Return what a person may change when a run is started, with the preset's values; `root` alone has none."""
    has_reference = recurring or not preset.has_warm_start
    reference = {"reference_source": preset.reference_source} if has_reference else {}
    return {
        # A second Start in the UI with untouched values is another run.
        "run": preset.name if recurring else "",
        "policy_source": preset.policy_source,
        **reference,
        **{f"{role}_source": source for role in _ROLES if (source := getattr(preset, f"{role}_source"))},
        "preferences_source": preset.preferences_source,
        "prompts_source": preset.prompts_source,
        "exclude_source": preset.exclude_source,
        "promote_as": preset.pointer,
        "seed": preset.seed,
        **{name: settings.to_dict() for name, settings in run_sections(preset).items()},
    }


def num_sampling_tasks(preset: Preset) -> int:
    """Return how many tasks of an iteration sample responses: none where only offline pairs are trained on."""
    return 0 if preset.is_offline else preset.num_shards


def run_sections(preset: Preset) -> dict[str, Settings]:
    """Return the settings that are parameters of a run, by name; `cluster` is fixed in the compiled pipeline."""
    return {name: settings for name, settings in preset.sections().items() if name != "cluster"}


def pods_section(preset: Preset) -> dict[str, Any]:
    """Return section `pods` of the stages, which is fixed too; empty where the task of training trains itself."""
    pods = training_pods(preset.launch, preset.cluster)
    return pods.to_dict() if pods else {}


def _choose_inputs(preset: Preset, given: Given) -> Given:
    names = ("root", "promote_as", "policy_source", "reference_source", "prompts_source")
    chosen = choose_inputs(**_take(given, *names), name=given["run"], job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    outputs = configure_task(chosen, CHOOSE_INPUTS, "choose inputs", preset).outputs
    return {**given, **{name: outputs[name] for name in ("run", *names[2:])}}


def _check_settings(preset: Preset, given: Given) -> dsl.PipelineTask:
    sections = {"warm_start_training": {}, **_take(given, *run_sections(preset)), "pods": pods_section(preset)}
    names = ("root", "run", "seed", "promote_as", "policy_source", *_DATA_SOURCES)
    checked = check_settings(
        **_take(given, *names),
        **sections,
        job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        reference_source=given.get("reference_source", ""),
        **{f"{role}_source": given.get(f"{role}_source", "") for role in _ROLES},
        num_iterations=preset.iterations,
        num_shards=num_sampling_tasks(preset),
        preset=preset.name,
        gpu_hour_price=float(preset.cluster.gpu_hour_price) if preset.cluster else 0.0,
        service_account=PIPELINE_ACCOUNT if preset.cluster else "",
    )
    return configure_task(checked, CHECK_SETTINGS, "check settings", preset)


def _run_stages(preset: Preset, iterations: list[GraphComponent], given: Given, recurring: bool) -> None:
    checked = _check_settings(preset, given)
    settings_uri = checked.outputs[_SETTINGS]
    # A judge or a model of rewards is there where the preset names its source.
    roles = [role for role in ("policy", "reference", *_ROLES) if f"{role}_source" in given]
    has_warm_start = preset.has_warm_start and not recurring
    imported = {role: _import(preset, role, settings_uri) for role in roles}
    prepared = _start(preset, Place(PREPARE_DATA.name), prepare_data, settings_uri, imported["policy"])
    if has_warm_start:
        prepared = _pair_and_train(preset, WARM_START, settings_uri, [prepared])
    _run_iterations(preset, iterations, settings_uri, [*imported.values(), prepared])


def _import(preset: Preset, role: str, settings_uri: Any) -> dsl.PipelineTask:
    imported = _keyed(import_model, f"import-{role}")(settings_uri=settings_uri, role=role)
    return configure_task(imported, IMPORT_MODEL, f"import {role}", preset)


def _run_iterations(
    preset: Preset, iterations: list[GraphComponent], settings_uri: Any, before: list[dsl.PipelineTask]
) -> None:
    """Run one after another; on a cluster each is inside the condition that the one before it has accepted its policy.

    kfp.local resolves no condition on what a task returns: it would skip the branch and call the run a success.
    """
    with ExitStack() as branches:
        for number, iteration in enumerate(iterations, start=1):
            done = iteration(settings_uri=settings_uri).set_display_name(f"iteration {number}").after(*before)
            if preset.cluster and number < len(iterations):
                is_accepted = done.outputs["decision"] == ACCEPTED
                branches.enter_context(dsl.If(is_accepted, name=f"if iteration {number} is accepted"))
            # What is inside a condition waits for what the condition reads.
            before = [] if preset.cluster else [done]


def _pair_and_train(
    preset: Preset, iteration: int, settings_uri: Any, before: Sequence[dsl.PipelineTask]
) -> dsl.PipelineTask:
    # The stage finds the shards by their number: not every KFP backend resolves a list of task outputs.
    paired = _start(preset, Place(PAIR.name, iteration), pair, settings_uri, *before)
    return _start(preset, Place(TRAIN.name, iteration), train, settings_uri, paired)


def _start(
    preset: Preset, place: Place, component: PythonComponent, settings_uri: Any, *before: dsl.PipelineTask
) -> dsl.PipelineTask:
    """Add the task at a place of the run, which waits for those before it."""
    task = _keyed(component, place.key)(settings_uri=settings_uri, place=place.below)
    return configure_task(task.after(*before), STAGES[place.stage], _title(place), preset)


def _title(place: Place) -> str:
    """Return what the UI calls a task: it shows an iteration's tasks inside of it, and those of the warm start not."""
    return place.title if place.iteration else place.label


def _keyed(component: PythonComponent, key: str) -> PythonComponent:
    """Return a component whose task has a key of its own: the UI finds the artifacts of a whole run by keys."""
    keyed = copy(component)
    keyed.component_spec = dataclasses.replace(component.component_spec, name=key)
    return keyed


def _take(given: Given, *names: str) -> dict[str, Any]:
    return {name: given[name] for name in names}


def _parameter(name: str, kind: type, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind, default=default)


def _pipeline(
    body: Callable[[Given], Any],
    name: str,
    display_name: str,
    inputs: list[inspect.Parameter],
    *,
    description: str = "",
    outputs: Any = inspect.Signature.empty,
) -> GraphComponent:
    """Make a kfp pipeline of a body that takes its inputs as one mapping.

    kfp reads the inputs from a signature and a docstring; which inputs there are depends on the preset, so that
    both are made here.
    """

    def function(*values: Any) -> Any:
        return body({entry.name: value for entry, value in zip(inputs, values, strict=True)})

    arguments = [f"    {entry.name}: {DESCRIPTIONS[entry.name]}" for entry in inputs if entry.name in DESCRIPTIONS]
    function.__doc__ = "\n".join([f"{description or display_name}.", "", "Args:", *arguments])
    function.__signature__ = inspect.Signature(inputs, return_annotation=outputs)  # type: ignore[attr-defined]
    pipeline: GraphComponent = dsl.pipeline(name=name, display_name=display_name)(function)
    return pipeline

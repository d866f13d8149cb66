"""Stage train: write the job down, launch it, and accept only what its manifest says it finished."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

from dice_core.data import records
from dice_core.launch.settings import LaunchConfig, PodConfig, parse_launch
from dice_core.progress import log
from dice_core.release.model_card import update_card
from dice_core.settings.base import ConfigError, Values
from dice_core.settings.quantities import quantity
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.models_agree import require_one_tokenizer
from dice_core.stages.parts import read_input
from dice_core.stages.place import WARM_START, Artifact, show
from dice_core.stages.run_settings import read_task
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import PAIR, TRAIN, WARM_START_TRAINING
from dice_core.storage import layout
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, Metric, require_manifest
from dice_core.training.disk import node_bytes
from dice_core.training.host_memory import pod_bytes
from dice_core.training.settings import TrainingConfig

_section: ContextVar[str] = ContextVar("section", default="training")
"""What a person calls the settings of the training that is under way."""


@leaves_reason(TRAIN)
def train(
    policy_uri: str,
    pairs_uri: str,
    output_uri: str,
    *,
    reference_uri: str = "",
    iteration: int = 1,
    training: Values = None,
    launch: Values = None,
    pods: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Train the policy on pairs by DPO, with itself as it starts for the reference.

    Args:
        policy_uri: the model to train, pi_{t-1}; it is the reference too, unless training.reference is base.
        pairs_uri: pair's output, or a Parquet file (records.PAIRS).
        output_uri: where the new model and metrics.jsonl go.
        reference_uri: the reference, where training.reference is base.
        iteration: number of the iteration, from 1; 0 is the warm start.
        training: settings, see TrainingConfig.
        launch: which processes train, see LaunchConfig.
        pods: what their pods look like if launch.backend is pytorchjob or trainjob, see PodConfig.
        seed: seed of the run.
        overwrite: first delete what this stage left at its output.

    Raises:
        LaunchError: a process failed; its last lines are in the message.
    """
    from dice_core.training.job import delete_leftovers

    layout.check_count(iteration, "iteration", 0)
    section = _section.get()
    config = TrainingConfig.parse(training, section)
    launch_config, pod_config = parse_launch(launch, pods)
    config.accumulation_steps(launch_config.num_nodes * launch_config.processes_per_node, section)
    if (config.reference == "base") != bool(reference_uri):
        raise ConfigError(
            f"{section}.reference: is {config.reference!r}, which needs "
            f"{'a reference, and none is given' if not reference_uri else f'no reference: leave out {reference_uri}'}"
        )
    work = partial(
        _run_job,
        training=config,
        section=section,
        launch=launch_config,
        pods=pod_config,
        seed=TRAIN.seed(seed, iteration),
    )
    report = run_stage(
        TRAIN,
        output_uri,
        work,
        settings={"training": config},
        arguments={"seed": seed, "iteration": iteration},
        overwrite=overwrite,
        inputs={"policy": policy_uri, "pairs": pairs_uri} | ({"reference": reference_uri} if reference_uri else {}),
    )
    if report.status == "already complete":
        # An attempt that was killed after it published: checkpoints are many times the model's size.
        delete_leftovers(output_uri)
    if report.status == "completed":
        update_card(output_uri)
    return report


@contextmanager
def _called(section: str) -> Iterator[None]:
    before = _section.set(section)
    try:
        yield
    finally:
        _section.reset(before)


def _run_job(
    context: StageContext, *, training: TrainingConfig, section: str, launch: LaunchConfig, pods: PodConfig, seed: int
) -> Manifest:
    """Write the job down, launch it, and accept only what its manifest says it finished."""
    from dice_core.launch.launch import launch_training
    from dice_core.training.checks import check_job
    from dice_core.training.job import TrainingJob

    pairs, reference = context.inputs["pairs"], context.inputs.get("reference")
    if reference:
        require_one_tokenizer(context, "policy", ("reference",))
    job = TrainingJob(
        output_uri=context.uri,
        policy_uri=context.inputs["policy"].uri,
        # The address of a user's own file, or the place of a pair stage, whose manifest the trainer checks.
        pairs_uri=layout.join(pairs.uri, pairs.tables()[0]) if pairs.is_users_file else pairs.uri,
        training=training,
        seed=seed,
        reference_uri=reference.uri if reference else "",
        manifest_fields={**context.manifest_fields, "ran_by": ran_by(launch, training)},
        section=section,
    )
    pairs.require_same("policy", context.inputs["policy"])
    if launch.backend == "torchrun":
        # A launcher in a small pod does not hold the pairs: the training pods say the same, one line as well.
        check_job(job, context.folder / "pairs")
    if pairs.is_users_file:
        _check_own_pairs(context)
    launch_training(job.write(), launch, sized(pods, context.inputs["policy"].manifest.metrics, training, launch))
    manifest = require_manifest(context.uri)
    if manifest.fingerprint != context.fingerprint:
        raise UnfitError(f"{context.uri}: another training published here while this one ran: take a new run name")
    return manifest


def _check_own_pairs(context: StageContext) -> None:
    """Check that a user's own pairs are token ids of the policy, before anything is launched."""
    from dice_core.data.chat import any_format
    from dice_core.models.loading import load_tokenizer
    from dice_core.preferences.own_responses import check_pairs

    source = context.inputs["pairs"]
    table = read_input(context, source, records.PAIRS, "pairs")
    template = any_format(load_tokenizer(context.fetch_tokenizer("policy")))
    check_pairs(table, template, layout.join(source.uri, source.tables()[0]))


def ran_by(launch: LaunchConfig, training: TrainingConfig) -> dict[str, Metric]:
    """Return what the manifest says of how it was trained: the processes, and how they share the states."""
    return {
        "runner": launch.backend,
        "num_nodes": launch.num_nodes,
        "processes_per_node": launch.processes_per_node,
        "data_parallel_size": launch.num_nodes * launch.processes_per_node,
        "zero_stage": {"none": 0, "zero2": 2, "zero3": 3}[training.deepspeed],
        "offload_optimizer": training.offload_optimizer,
    }


def sized(pods: PodConfig, policy: Mapping[str, Metric], training: TrainingConfig, launch: LaunchConfig) -> PodConfig:
    """Return what the pods look like, with requests that follow from the model, as far as its size is known.

    That is the disk, where nobody chose it; and with optimizer states in the node's memory what those take, where less
    was chosen: a pod with less would be killed at its first step, or at its last.

    Args:
        pods: as they were chosen.
        policy: metrics of the manifest of the model that is trained.
        training: its settings.
        launch: the pods' number and processes.
    """
    num_parameters = policy.get("num_parameters")
    if not isinstance(num_parameters, int | float):
        return pods
    requests = {}
    if not pods.disk:
        num_bytes = node_bytes(
            int(num_parameters),
            training,
            launch.num_nodes,
            has_scratch_volume=bool(pods.scratch_volume),
            has_cache_volume=bool(pods.model_cache_claim),
        )
        requests["disk"] = _in_gib(num_bytes)
    if training.offload_optimizer != "none":
        num_bytes = pod_bytes(int(num_parameters), training, launch.num_nodes, launch.processes_per_node)
        if quantity(pods.memory or "0") < num_bytes:
            requests["memory"] = _in_gib(num_bytes)
            log(
                f"train: a pod asks for {requests['memory']} of memory, not {pods.memory or 'any'}: optimizer states "
                f"of {num_parameters / 1e9:.1f} billion parameters are kept there (training.offload_optimizer)"
            )
    return pods.model_copy(update=requests)


def _in_gib(num_bytes: int) -> str:
    return f"{-(-num_bytes >> 30)}Gi"


def train_task(settings_uri: str, place: str, metrics: Artifact) -> None:
    """Train the policy of an iteration, as a task of a pipeline; see train."""
    task = read_task(settings_uri, place)
    settings = task.settings(TRAIN)
    is_base = settings["training"].get("reference") == "base"
    with _called(WARM_START_TRAINING if task.iteration == WARM_START else _section.get()):
        report = train(
            task.policy_uri(task.iteration - 1),
            task.of(PAIR).uri,
            task.uri,
            reference_uri=task.policy_uri(-1) if is_base else "",
            iteration=task.iteration,
            seed=task.plan["seed"],
            **settings,
        )
    show(report, task.place, metrics)

"""`make submit`: start a run of a preset on the cluster, and follow it.

Everything that can be wrong is looked at before anything is sent. Settings travel as parameters of the run, so that
runs which differ in them alone share a pipeline version; its name is a digest of what was compiled.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from components import images
from dice_core.generation.settings import EngineConfig
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.settings.base import ConfigError
from dice_core.storage import layout
from pipelines.cluster.config import CONFIG_MAP, PIPELINE_ACCOUNT
from pipelines.kfp.api import Connection, KfpApi, KfpError
from pipelines.kfp.dry_run import dry_run_lines
from pipelines.kfp.follow import Pace, follow
from pipelines.kfp.run_view import LOST, Observer
from pipelines.kfp.runs import runs_of
from pipelines.kfp.sources import check_sources
from pipelines.planning.make import has_pools_nodes, make_plan
from pipelines.presets import PRESETS, Preset

MAX_PARAMETER_BYTES = 10_000
"""What KFP's API server takes for all parameters of a run together."""
ACTIVE = ("PENDING", "RUNNING", "CANCELING", "PAUSED")


@dataclasses.dataclass(frozen=True)
class Submission:
    """A run as it will be sent: the compiled pipeline and everything beside it."""

    name: str
    """Name of the run and of its folder below the root. The same name again continues the run."""
    pipeline: str
    """Name of the pipeline and of the experiment."""
    version: str
    description: str
    """Of the version, which runs of other settings share."""
    package: Path
    spec: Mapping[str, Any]
    """What the package says of the pipeline."""
    parameters: dict[str, Any]


def submit(options: argparse.Namespace, preset: Preset, pace: Pace | None = None) -> int:
    """Start a run; with --wait, follow it and return 1 unless it succeeds."""
    name = layout.check_name(options.run or default_run_name(preset), "run")
    require_fit(preset)
    root = chosen_root(options.root, partial(root_of_cluster, options))
    with tempfile.TemporaryDirectory(prefix="dice-") as folder:
        submission = prepare(preset, name, root, Path(folder))
        if options.dry_run:
            print(show(submission, preset))
        check_images(preset)
        connection = Connection.from_environment(options.host, options.namespace)
        if options.dry_run:
            return 0
        api = KfpApi(connection)
        observe = partial(Observer, api, connection.namespace, options.context)
        if options.run:
            check_not_active(api, name, observe)
            check_same_pipeline(api, name, submission.pipeline)
        run = send(api, submission)
    print(f"run {name}: {api.address('runs', run.run_id)}")
    if not options.wait:
        print(f"follow it: make status RUN={name}   stop it: make cancel RUN={name}")
        return 0
    return follow(observe(run.run_id), name, pace)


def default_run_name(preset: Preset) -> str:
    """Return a new name: the preset and the time."""
    return f"{preset.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def chosen_root(root: str, deployed: Callable[[], str] | None = None) -> str:
    """Return where runs keep their data: the option, DICE_ROOT, or what the cluster was deployed with.

    Args:
        root: the option.
        deployed: asks the cluster; only called where nothing else says it.

    Raises:
        ConfigError: nothing says it.
        ValueError: it is a place that pods cannot reach.
    """
    root = root or os.environ.get("DICE_ROOT", "") or (deployed() if deployed else "")
    if not root:
        raise ConfigError(
            "root: not set: where runs keep their data, such as DICE_ROOT=s3://bucket/prefix (what a cluster was "
            "deployed with: kubectl get configmap dice-config -o jsonpath={.data.DICE_ROOT})"
        )
    layout.check_s3(root, "root")
    return root.rstrip("/")


def root_of_cluster(options: argparse.Namespace) -> str:
    """Return the root in the cluster's ConfigMap; empty where no cluster can be asked."""
    try:
        cluster = KubernetesApi(
            options.namespace or os.environ.get("DICE_NAMESPACE") or "kubeflow", context=options.context
        )
        found = cluster.named("configmaps", CONFIG_MAP) or {}
    except KubernetesError as error:
        print(f"pipelines: {error}", file=sys.stderr)
        return ""
    return str((found.get("data") or {}).get("DICE_ROOT", ""))


def prepare(preset: Preset, name: str, root: str, folder: Path, *, recurring: bool = False) -> Submission:
    """Check everything and compile; nothing is sent.

    Args:
        preset: with its changes.
        name: of the run, or what the names of recurring runs begin with.
        root: of all runs.
        folder: gets the compiled pipeline.
        recurring: compile the pipeline that chooses its own inputs.

    Raises:
        ConfigError: what would fail on the cluster.
    """
    # Imported when it is needed: a typo is told without the seconds that kfp takes to load.
    from kfp import compiler

    from pipelines.dice import build_pipeline, default_parameters

    parameters = {**default_parameters(preset, recurring=recurring), "root": root, "run": name}
    check_sources(parameters)
    if (size := len(json.dumps(parameters))) > MAX_PARAMETER_BYTES:
        raise ConfigError(f"parameters: {size} bytes in all, KFP takes {MAX_PARAMETER_BYTES}: shorten the settings")
    shape = shape_of(preset)
    pipeline = build_pipeline(shape, recurring=recurring)
    package = folder / f"{pipeline.name}.yaml"
    compiler.Compiler().compile(pipeline, str(package))
    documents = _read_package(package)
    version = f"{pipeline.name}-{content_digest(documents)}"
    return Submission(name, pipeline.name, version, shape.description, package, documents[0], parameters)


def _read_package(package: Path) -> list[dict[str, Any]]:
    import yaml

    return list(yaml.load_all(package.read_text(), yaml.CSafeLoader))


def content_digest(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return a digest of a compiled pipeline: of what it says, for its comments change from process to process."""
    return hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()[:12]


def shape_of(preset: Preset) -> Preset:
    """Return the preset's original with those changes that decide the compiled graph; the rest are parameters."""
    original = PRESETS[preset.name]()
    names = ("iterations", "num_shards", "num_retries", "cluster", "launch")
    changes = {name: getattr(preset, name) for name in names}
    if original.is_offline != preset.is_offline:
        ratio = {"replay_ratio": preset.pairing.replay_ratio}
        changes["pairing"] = original.pairing.model_copy(update=ratio)
    # Models have a task each that imports them; without a reference there is a warm start.
    sources = {name: getattr(preset, name) for name in ("reference_source", "judge_source", "reward_source")}
    changes |= {name: source for name, source in sources.items() if bool(source) != bool(getattr(original, name))}
    # As many GPUs as vLLM spreads a model over are asked for by the task.
    for name, engine in original.sections().items():
        if isinstance(engine, EngineConfig):
            spread = {"tensor_parallel_size": getattr(preset, name).tensor_parallel_size}
            changes[name] = engine.model_copy(update=spread)
    return dataclasses.replace(original, **changes)


def check_images(preset: Preset, wanted: Sequence[str] = ()) -> None:
    """Raise an error for images without a registry where nodes pull them: Docker Hub may have others of their names.

    A cluster without GPUs is kind's, which gets them by make kind-load.

    Args:
        preset: where they run.
        wanted: names of the images; none: those of the suite.

    Raises:
        ConfigError: one line naming an image and what to do.
    """
    wanted = wanted or (images.CORE, images.GENERATE, images.TRAIN)
    bare = next((image for image in wanted if not images.names_a_registry(image)), "")
    if bare and preset.cluster is not None and preset.cluster.gpu_resource:
        raise ConfigError(
            f"images: {bare} names no registry, and nodes would ask Docker Hub: give the REGISTRY= of make images push"
        )


def require_fit(preset: Preset) -> None:
    """Refuse a run that surely cannot fit its GPUs or its pods; models and nodes of unknown sizes are let through.

    Raises:
        ConfigError: one line: the stage, what it needs and has, and the setting to change.
    """
    if preset.cluster is None or not preset.cluster.gpu_resource or not has_pools_nodes(preset):
        return
    try:
        plan = make_plan(preset, asks_hub=False)
    except ConfigError:
        # Nothing here tells the model's shape: the stages find out.
        return
    if plan.refusals:
        raise ConfigError(f"cannot fit: {plan.refusals[0]} (make plan PRESET={preset.name} shows all)")


def check_same_pipeline(api: KfpApi, name: str, pipeline: str) -> None:
    """Raise KfpError when a name is that of another pipeline's run: its data is what a forgotten PRESET= would take."""
    for run in runs_of(api, name)[:1]:
        if run.recurring_run_id:
            raise KfpError(
                f"run {name!r} is a recurring one, with inputs that it chose itself: make retry RUN={name} continues "
                "it, for a run of your own take another RUN="
            )
        found = api.pipeline_spec(run).get("pipelineInfo", {}).get("name", pipeline)
        if found != pipeline:
            raise KfpError(
                f"run {name!r} is one of {found} and not of {pipeline}: give its PRESET= (and REGISTRY=, TAG= and SET= "
                "as before), or take another RUN="
            )


def check_not_active(api: KfpApi, name: str, observe: Callable[[str], Observer]) -> None:
    """Raise KfpError when a run of that name is under way: two would write to the same place.

    Args:
        api: of the runs.
        name: of the run.
        observe: looks at the run with an id: one whose workflow has gone is not under way, whatever KFP says.
    """
    for run in runs_of(api, name):
        if run.state in ACTIVE and observe(run.run_id).look().state != LOST:
            raise KfpError(
                f"run {name!r} is {run.state} already ({api.address('runs', run.run_id)}): follow it by make status "
                f"RUN={name}, or stop it by make cancel RUN={name}"
            )


def send(api: KfpApi, submission: Submission) -> Any:
    """Upload the pipeline version unless it is there, and start the run."""
    version = upload(api, submission)
    experiment = api.experiment(submission.pipeline)
    return api.start_run(experiment, submission.name, submission.parameters, version, PIPELINE_ACCOUNT)


def upload(api: KfpApi, submission: Submission) -> Any:
    """Return the pipeline version of the submission's content."""
    version, is_new = api.upload_once(
        submission.pipeline, submission.version, submission.package, submission.description
    )
    print(f"pipeline version {submission.version}: {'uploaded' if is_new else 'is there already'}")
    return version


def show(submission: Submission, preset: Preset) -> str:
    """Return what a dry run would have sent, for people."""
    kib = submission.package.stat().st_size >> 10
    lines = [
        f"pipeline:        {submission.pipeline} ({preset.description})",
        f"version:         {submission.version} ({kib} KiB; uploaded unless it is there; make compile writes it)",
        f"experiment:      {submission.pipeline}",
        f"run:             {submission.name}",
        f"service account: {PIPELINE_ACCOUNT}",
        *dry_run_lines(preset, submission.spec),
        "parameters:",
    ]
    lines += (f"  {name}: {json.dumps(value)}" for name, value in submission.parameters.items())
    return "\n".join([*lines, "a dry run: nothing was sent"])

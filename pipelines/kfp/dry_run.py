"""What a run would be, for people: its graph, pods and images, as compiled, and where its settings leave the preset.

Reads a compiled pipeline and a preset; asks nobody.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from components import images
from dice_core.launch.job_kinds import JOB_KINDS
from dice_core.stages.table import STAGES, TRAIN
from pipelines.cluster.training_pods import training_pods
from pipelines.kfp.task_graph import graph_tasks
from pipelines.presets import PRESETS, Preset, counted


class _Pod(NamedTuple):
    """What a task asks of its node."""

    image: str
    resources: str


def dry_run_lines(preset: Preset, spec: Mapping[str, Any]) -> list[str]:
    """Return the lines that tell a person what would run.

    Args:
        preset: with its changes.
        spec: the pipeline compiled from it.
    """
    return [
        f"graph:           {_graph(preset, spec)}",
        "images:",
        *(f"  {line}" for line in _image_lines(preset, spec)),
        "pods:",
        *(f"  {line}" for line in _pod_lines(preset, spec)),
        *_change_lines(preset),
    ]


def _graph(preset: Preset, spec: Mapping[str, Any]) -> str:
    start = "a warm start, " if preset.has_warm_start else ""
    tasks = counted(len(graph_tasks(spec)), "task")
    return f"{start}{counted(preset.iterations, 'iteration')}, {preset.sampling}, {tasks}"


def _image_lines(preset: Preset, spec: Mapping[str, Any]) -> Iterator[str]:
    found = {pod.image for _, pod in _pods(spec)}
    if pods := training_pods(preset.launch, preset.cluster):
        found.add(pods.image)
    for image in sorted(found):
        yield image if images.names_a_registry(image) else f"{image} (names no registry)"


def _pod_lines(preset: Preset, spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield the pods that ask for the same, in the order of the stages, and then those of training."""
    stages = list(STAGES)
    numbers: dict[_Pod, Counter[str]] = {}
    for stage, pod in sorted(_pods(spec), key=lambda entry: stages.index(entry[0])):
        numbers.setdefault(pod, Counter())[stage] += 1
    for pod, of_stage in numbers.items():
        names = ", ".join(f"{number} x {stage}" for stage, number in of_stage.items())
        yield f"{names}: {pod.resources}; {pod.image}"
    if pods := training_pods(preset.launch, preset.cluster):
        gpus = {pods.gpu_resource: preset.launch.processes_per_node} if pods.gpu_resource else {}
        asked = _resources({"cpu": pods.cpu, "memory": pods.memory}, gpus)
        nodes, trainings = preset.launch.num_nodes, _num_tasks(spec, TRAIN.name)
        kind = JOB_KINDS[preset.launch.backend].name
        yield f"{nodes * trainings} x training pod of a {kind}, {nodes} at a time: {asked}; {pods.image}"


def _num_tasks(spec: Mapping[str, Any], stage: str) -> int:
    return sum(name == stage for name, _ in _pods(spec))


def _pods(spec: Mapping[str, Any]) -> Iterator[tuple[str, _Pod]]:
    """Yield (stage, what its pod asks for) of each task."""
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        asked = container.get("resources", {})
        gpu = asked.get("accelerator", {})
        names = {"cpu": "resourceCpuRequest", "memory": "resourceMemoryRequest"}
        sizes = {name: asked.get(key, "") for name, key in names.items()}
        gpus = {gpu["resourceType"]: gpu["resourceCount"]} if gpu else {}
        yield container["args"][-1].replace("_", "-"), _Pod(container["image"], _resources(sizes, gpus))


def _resources(sizes: Mapping[str, str], gpus: Mapping[str, Any]) -> str:
    words = [f"{name} {size}" for name, size in sizes.items() if size]
    return ", ".join([*words, *(f"{number} {name}" for name, number in gpus.items())]) or "nothing asked for"


def _change_lines(preset: Preset) -> Iterator[str]:
    changes = list(changed_settings(preset))
    if not changes:
        yield f"settings:        those of preset {preset.name}"
        return
    yield f"settings that differ from preset {preset.name}:"
    yield from (f"  {name}={_as_text(now)} (preset: {_as_text(then)})" for name, then, now in changes)


def changed_settings(preset: Preset) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, the preset's value, the value now) of each setting that was changed."""
    before, after = _by_name(PRESETS[preset.name]()), _by_name(preset)
    yield from ((name, before.get(name), now) for name, now in after.items() if before.get(name) != now)


def _by_name(preset: Preset) -> dict[str, Any]:
    sections = preset.sections().items()
    fields = {f"{name}.{field}": value for name, section in sections for field, value in section.to_dict().items()}
    return {name: getattr(preset, name) for name in preset.own_fields()} | fields


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)

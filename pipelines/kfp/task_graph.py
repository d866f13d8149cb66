"""The tasks of a compiled pipeline: where each stands in the graph, what people call it, where its results lie.

Reads KFP's pipeline spec; knows no state.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dice_core.stages.place import Place

EXIT = ".onExit"
"""Argo runs an exit task in a frame of this ending, beside the task whose end it waits for."""


@dataclass(frozen=True)
class GraphTask:
    """A task that is a pod."""

    path: str
    """Keys of the graphs around it and its own, joined by dots, as the names of Argo's nodes have them."""
    label: str
    """What people call it."""
    conditions: tuple[str, ...] = ()
    """Paths of the conditions that it is inside of."""
    place: Place | None = None
    """Where its results lie; None: not known."""


def graph_tasks(pipeline_spec: Mapping[str, Any]) -> list[GraphTask]:
    """Return all tasks of a pipeline in the order of the graph.

    Args:
        pipeline_spec: as compiled; empty gives no task.
    """
    if "root" not in pipeline_spec:
        return []
    return list(_tasks_of(pipeline_spec, pipeline_spec["root"]["dag"], "root", "", ()))


def key_of(path: str) -> str:
    """Return the key of the task at a path."""
    return path.rpartition(".")[2]


def driver_of(path: str) -> str:
    """Return the path of the node that prepares the task at a path."""
    return f"{path}-driver"


def _tasks_of(
    spec: Mapping[str, Any], dag: Mapping[str, Any], path: str, frame: str, conditions: tuple[str, ...]
) -> Iterator[GraphTask]:
    for key, task in _in_order(dag["tasks"]):
        component, name = spec["components"][task["componentRef"]["name"]], task["taskInfo"]["name"]
        trigger = task.get("triggerPolicy", {})
        here = f"{path}.{key}"
        if "dag" in component:
            # The exit handler and conditions are frames around tasks, not a part that a person knows.
            inner = f"{name}: " if name.startswith("iteration") else frame
            inside = (*conditions, here) if "condition" in trigger else conditions
            yield from _tasks_of(spec, component["dag"], here, inner, inside)
            continue
        if "strategy" in trigger:
            here = f"{path}.{task['dependentTasks'][0]}{EXIT}.{key}"
        yield GraphTask(here, frame + name, conditions, _place(spec, component, task))


def _place(spec: Mapping[str, Any], component: Mapping[str, Any], task: Mapping[str, Any]) -> Place | None:
    executor = spec.get("deploymentSpec", {}).get("executors", {}).get(component.get("executorLabel"))
    if not executor:
        return None
    inputs = {
        name: value["runtimeValue"]["constant"]
        for name, value in task.get("inputs", {}).get("parameters", {}).items()
        if "constant" in value.get("runtimeValue", {})
    }
    if below := inputs.get("place"):
        return Place.parse(str(below))
    # Pipelines of older versions say iteration and shard one by one.
    number = {name: int(inputs[name]) for name in ("iteration", "shard", "num_shards") if name in inputs}
    stage = executor["container"]["args"][-1].replace("_", "-")
    shard = {"shard": number["shard"], "num_shards": number["num_shards"]} if "shard" in number else {}
    return Place(stage, number.get("iteration"), **shard)


def _in_order(tasks: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return tasks after those they wait for; of the free ones the first by name, numbers by their size."""
    left = dict(sorted(tasks.items(), key=lambda entry: _by_number(entry[0])))
    ordered = list[tuple[str, Any]]()
    while left:
        free = next((key for key, task in left.items() if not left.keys() & set(task.get("dependentTasks", ()))), None)
        key = free or next(iter(left))
        ordered.append((key, left.pop(key)))
    return ordered


def _by_number(key: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in key.split("-"))

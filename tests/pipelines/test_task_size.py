"""How much of a workflow a task takes: KFP's retry and its API need the whole of it within etcd's 1.5 MiB."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipelines.overrides import apply_overrides
from pipelines.presets import PRESETS
from tests.compiled_pipeline import Compiled
from tests.driver_patch import driver_patch
from tests.kfp_recordings import recorded_nodes

pytestmark = pytest.mark.slow

MOST = 3_500
"""Bytes of a task, in any preset. Before tasks were shortened: 4,562 to 8,756."""
OF_THE_RUN = {"check-settings": 10_000, "report": 4_200}
"""Once in a run: every setting is a parameter of the one, and the other has three things to show."""
RUN = "s3://dice/dice/runs/second"
SETTINGS = f"{RUN}/check-settings/settings-0123456789ab.json"
RECORDED = ("workflow-eight-shards-under-way", "workflow-retried-succeeded")
NODES_BYTES = 15_000
"""What else a task takes in the recorded workflows: Argo's own fields of its nodes, and its part of the graphs."""


class TaskParts(NamedTuple):
    """What the driver of a task is given, and what it writes."""

    patch: str
    given: list[Any]
    """The component, the container and the settings of its pod."""


def value_of(compiled: Compiled, name: str, entry: dict[str, Any]) -> Any:
    """Return what a parameter of a task has when it runs."""
    if name == "settings_uri":
        return SETTINGS
    if "runtimeValue" in entry:
        return entry["runtimeValue"]["constant"]
    given = entry.get("componentInputParameter", "").removeprefix("pipelinechannel--")
    known = compiled.spec["root"]["inputDefinitions"]["parameters"].get(given, {})
    return known.get("defaultValue", RUN)


def compiled_tasks(preset: str, folder: Path, *changes: str) -> dict[str, TaskParts]:
    compiled, found = Compiled(apply_overrides(PRESETS[preset](), changes), folder), dict[str, TaskParts]()
    for key, task in compiled.keyed_tasks().items():
        component = compiled.spec["components"][task["componentRef"]["name"]]
        label = component["executorLabel"]
        container = compiled.spec["deploymentSpec"]["executors"][label]["container"]
        inputs = {name: value_of(compiled, name, entry) for name, entry in task["inputs"]["parameters"].items()}
        given = [component, container, compiled.platform[label]]
        found[key] = TaskParts(driver_patch(*given, pipeline=f"dice-{preset}", task=key, inputs=inputs), given)
    assert len(found) >= 11
    return found


def recorded_tasks(workflow: str) -> Iterator[tuple[TaskParts, dict[str, Any]]]:
    """Yield the tasks of a recorded workflow whose drivers have ended, with what each driver was given by name."""
    for node in recorded_nodes(workflow):
        if node["templateName"] == "system-container-driver" and node["type"] == "Pod" and "outputs" in node:
            named = {entry["name"]: entry.get("value", "") for entry in node["inputs"]["parameters"]}
            (patch,) = [e["value"] for e in node["outputs"]["parameters"] if e["name"] == "pod-spec-patch"]
            given = [json.loads(named[name]) for name in ("component", "container", "kubernetes-config")]
            yield TaskParts(patch, given), named


def status_bytes(tasks: Iterable[TaskParts]) -> int:
    """Return what tasks take of their workflow's status: the patch six times, what the driver is given twice."""

    def stored(value: Any) -> int:
        return len(json.dumps(value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))))

    return sum(6 * stored(patch) + 2 * sum(map(stored, given)) + NODES_BYTES for patch, given in tasks)


@pytest.mark.parametrize("workflow", RECORDED)
def test_the_patch_is_computed_as_the_driver_writes_it(workflow: str) -> None:
    """To 2 in a hundred."""
    num_tasks = 0
    for (written, given), named in recorded_tasks(workflow):
        command = json.loads(written)["containers"][0]["command"]
        executor_input = json.loads(command[command.index("--executor_input") + 1])
        inputs = executor_input.get("inputs", {}).get("parameterValues", {})
        computed = driver_patch(*given, pipeline="dice-demo", task=named["task-name"], inputs=inputs)
        assert len(computed) == pytest.approx(len(written), rel=0.02)
        num_tasks += 1
    assert num_tasks >= 16


@pytest.mark.parametrize("workflow", RECORDED)
def test_the_size_of_a_status_follows_from_its_tasks(workflow: str) -> None:
    """To 5 in a hundred."""
    written = len(json.dumps(recorded_nodes(workflow), separators=(",", ":")))
    assert status_bytes(task for task, _ in recorded_tasks(workflow)) == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_task_stays_small(preset: str, tmp_path: Path) -> None:
    found = {key: len(task.patch) for key, task in compiled_tasks(preset, tmp_path).items()}
    assert {key: size for key, size in found.items() if size > OF_THE_RUN.get(key, MOST)} == {}


@pytest.mark.parametrize(("num_shards", "mebibytes"), [(8, 1.13), (12, 1.45)])
def test_the_status_of_a_run_has_the_size_that_the_documents_tell(
    num_shards: int, mebibytes: float, tmp_path: Path
) -> None:
    found = status_bytes(compiled_tasks("zephyr", tmp_path, f"num_shards={num_shards}").values())
    assert found / 2**20 == pytest.approx(mebibytes, abs=0.01)

"""How much of a workflow a task takes: KFP's retry and its API need the whole of it within etcd's 1.5 MiB."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.presets import PRESETS
from tests.compiled_pipeline import Compiled
from tests.driver_patch import driver_patch
from tests.kfp_recordings import recorded_nodes

pytestmark = pytest.mark.slow

# Of the longest task of its kind in any preset, in bytes. Before tasks were shortened: 4,562 (import) to 8,756.
MOST = {"import": 4_050, "prepare": 3_900, "pair": 4_050, "train": 4_150, "score": 4_700}
MOST |= {"evaluate": 5_000}
ADDRESS = "s3://dice/dice/runs/second/iteration-1/pair"


def value_of(compiled: Compiled, name: str, entry: dict[str, Any]) -> Any:
    """Return what a parameter of a task has when it runs; an address where another task made it, but the run's name."""
    if name == "run":
        return "zephyr"
    if "runtimeValue" in entry:
        return entry["runtimeValue"]["constant"]
    given = entry.get("componentInputParameter", "").removeprefix("pipelinechannel--")
    known = compiled.spec["root"]["inputDefinitions"]["parameters"].get(given, {})
    return known.get("defaultValue", ADDRESS)


def test_the_patch_is_computed_as_the_driver_writes_it() -> None:
    """To 2 in a hundred, for every task of two recorded workflows."""
    num_tasks = 0
    for node in recorded_nodes("workflow-eight-shards-under-way", "workflow-retried-succeeded"):
        if node["templateName"] != "system-container-driver" or node["type"] != "Pod" or "outputs" not in node:
            continue
        given = {entry["name"]: entry.get("value", "") for entry in node["inputs"]["parameters"]}
        (written,) = [e["value"] for e in node["outputs"]["parameters"] if e["name"] == "pod-spec-patch"]
        command = json.loads(written)["containers"][0]["command"]
        executor_input = json.loads(command[command.index("--executor_input") + 1])
        computed = driver_patch(
            *(json.loads(given[name]) for name in ("component", "container", "kubernetes-config")),
            pipeline="dice-demo",
            task=given["task-name"],
            inputs=executor_input.get("inputs", {}).get("parameterValues", {}),
        )
        assert len(computed) == pytest.approx(len(written), rel=0.02)
        num_tasks += 1
    assert num_tasks > 30


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_task_stays_small(preset: str, tmp_path: Path) -> None:
    compiled, found = Compiled(PRESETS[preset](), tmp_path), dict[str, int]()
    for key, task in compiled.keyed_tasks().items():
        component = compiled.spec["components"][task["componentRef"]["name"]]
        label = component["executorLabel"]
        inputs = {name: value_of(compiled, name, entry) for name, entry in task["inputs"]["parameters"].items()}
        container = compiled.spec["deploymentSpec"]["executors"][label]["container"]
        patch = driver_patch(
            component, container, compiled.platform[label], pipeline=f"dice-{preset}", task=key, inputs=inputs
        )
        kind = next((kind for kind in MOST if kind in key.split("-")), "")
        found[kind] = max(found.get(kind, 0), len(patch))
    assert {kind: size for kind, size in found.items() if kind and size > MOST[kind]} == {}

"""A compiled pipeline, read back from its YAML, as a cluster reads it."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kfp import compiler

from pipelines.dice import build_pipeline
from pipelines.overrides import apply_overrides
from pipelines.presets import PRESETS, Preset


class Executor(NamedTuple):
    """One kind of pod: its container, and what the platform adds to it."""

    container: dict[str, Any]
    platform: dict[str, Any]


class Compiled:
    """The pipeline of a preset as its YAML has it."""

    def __init__(self, preset: Preset, folder: Path) -> None:
        path = folder / "pipeline.yaml"
        compiler.Compiler().compile(build_pipeline(preset), str(path))
        documents = list(yaml.load_all(path.read_text(), yaml.CSafeLoader))
        self.spec = documents[0]
        platform = documents[1]["platforms"]["kubernetes"] if len(documents) > 1 else {"deploymentSpec": {}}
        self.platform = platform["deploymentSpec"].get("executors", {})

    def section(self, name: str) -> dict[str, Any]:
        """Return the settings of a section that is a parameter of a run."""
        return self.spec["root"]["inputDefinitions"]["parameters"][name]["defaultValue"]

    def planned(self, name: str) -> Any:
        """Return what check-settings gets that is no parameter of a run, and writes down."""
        (found,) = [task["inputs"]["parameters"][name] for stage, task in self.tasks() if stage == "check-settings"]
        return found["runtimeValue"]["constant"]

    @property
    def pods(self) -> dict[str, Any]:
        """Return the settings of the training pods: check-settings gets them, and writes them down for the others."""
        return dict(self.planned("pods"))

    def executors(self, *stages: str) -> list[Executor]:
        """Return the executors of stages (all by default), by what their containers run."""
        found = []
        for name, executor in self.spec["deploymentSpec"]["executors"].items():
            stage = executor["container"]["args"][-1].replace("_", "-")
            if not stages or stage in stages:
                found.append(Executor(executor["container"], self.platform.get(name, {})))
        assert found
        return found

    def keyed_tasks(self) -> dict[str, dict[str, Any]]:
        """Return the tasks that are pods, by key."""
        graphs = [self.spec["root"], *self.spec["components"].values()]
        pairs = [pair for graph in graphs if "dag" in graph for pair in graph["dag"]["tasks"].items()]
        tasks = {
            key: task for key, task in pairs if "executorLabel" in self.spec["components"][task["componentRef"]["name"]]
        }
        assert len(tasks) == len([None for _, task in self.tasks()]), "a key stands in two graphs"
        return tasks

    def tasks(self) -> list[tuple[str, dict[str, Any]]]:
        """Return (stage, task) of all tasks that are pods."""
        graphs = [self.spec["root"], *self.spec["components"].values()]
        tasks = [task for graph in graphs if "dag" in graph for task in graph["dag"]["tasks"].values()]
        executors = self.spec["deploymentSpec"]["executors"]
        labels = [self.spec["components"][task["componentRef"]["name"]].get("executorLabel") for task in tasks]
        return [
            (executors[label]["container"]["args"][-1].replace("_", "-"), task)
            for label, task in zip(labels, tasks, strict=True)
            if label
        ]


def compiled_spec(preset: str, changes: list[str]) -> dict[str, Any]:
    """Return the pipeline part of what a preset compiles to, with settings changed."""
    with tempfile.TemporaryDirectory() as folder:
        return dict(Compiled(apply_overrides(PRESETS[preset](), changes), Path(folder)).spec)

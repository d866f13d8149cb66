"""That a body calls its stage with what belongs to its place in the run, and says what came of it."""

import ast
import importlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from components import images
from dice_core.models import importing as models
from dice_core.stages.import_model import import_model
from dice_core.stages.run_settings import read_task, write_settings
from dice_core.stages.runner import StageReport
from dice_core.stages.table import STAGES
from dice_core.storage import layout
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files

FOLDER = Path(images.__file__).parent
NO_STAGES = ("__init__", "__main__", "component", "images")
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NO_STAGES)


def component(name: str) -> Any:
    return getattr(importlib.import_module(f"components.{name}"), name)


def definition(name: str) -> ast.FunctionDef:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef))


def stage_function(name: str) -> Any:
    return STAGES[name.replace("_", "-")].function


SECTIONS = {"generation": {"num_responses": 3}, "training": {"beta": 0.2}, "warm_start_training": {"beta": 0.3}}
PLAN = {"seed": 5, "num_shards": 2, "promote_as": "p", "preferences_source": "a", "prompts_source": ""}
PLAN |= {"policy_source": "org/policy", "reference_source": "org/reference"}
PLAN |= {"judge_source": "org/judge", "reward_source": "org/reward"}
PLAN |= {"exclude_source": "s3://b/exclude"}


class FakeArtifact:
    """An output artifact as a body sees it."""

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = str(path), dict[str, Any]()


def test_there_is_a_component_for_every_stage_of_a_pipeline() -> None:
    assert [name.replace("_", "-") for name in NAMES] == sorted(name for name, stage in STAGES.items() if stage.is_task)


@pytest.mark.parametrize("name", NAMES)
def test_a_body_is_one_call_and_nothing_is_described_twice(name: str) -> None:
    """KFP keeps the descriptions of each task four times in a workflow, which has to fit into etcd."""
    *given, brought, call = definition(name).body
    assert [ast.unparse(line) for line in given] in ([], ["given = locals()"])
    assert ast.unparse(brought) == f"from dice_core.stages.{name} import {name}_task"
    assert isinstance(call, ast.Return | ast.Expr)
    spec = component(name).pipeline_spec.components[f"comp-{name.replace('_', '-')}"]
    inputs, outputs = spec.input_definitions.parameters, spec.output_definitions
    described = [*inputs.values(), *outputs.parameters.values(), *outputs.artifacts.values()]
    assert not any(entry.description for entry in described)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_installed_when_a_pod_starts(name: str) -> None:
    container = component(name).component_spec.implementation.container
    assert not re.search(r"pip3? install", " ".join(container.command))
    assert container.image in (images.CORE, images.GENERATE, images.TRAIN)


def test_images_are_named_by_the_environment_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_REGISTRY", "registry.example/team/")
    monkeypatch.setenv("DICE_TAG", "v7")
    monkeypatch.setenv("DICE_TRAIN_IMAGE", "other/train@sha256:0")
    try:
        importlib.reload(images)
        assert images.CORE == "registry.example/team/dice-core:v7"
        assert images.GENERATE == "registry.example/team/dice-generate:v7"
        assert images.TRAIN == "other/train@sha256:0"
    finally:
        monkeypatch.undo()
        importlib.reload(images)


def test_each_body_calls_its_stage_with_the_addresses_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stages are replaced by their signatures: a call that does not fit them fails, and the address is recorded."""
    called = {}

    def stand_in(name: str) -> Any:
        signature = inspect.signature(stage_function(name))

        def stage(*args: Any, **kwargs: Any) -> StageReport:
            called[name] = signature.bind(*args, **kwargs).arguments
            return StageReport(called[name]["output_uri"], "completed", {"count": 3})

        return stage

    root = str(tmp_path / "root")
    run = layout.run(root, "r")
    places = {
        "prepare_data": "data",
        "pair": "iteration-1/pair",
        "train": "iteration-1/train",
        "evaluate": "iteration-1/evaluate",
    }
    tasks = {name: f"iteration 1: {name}" for name in ("pair", "train", "evaluate")}
    tasks |= {"import_model": "import model", "prepare_data": "prepare data"}
    settings_uri = write_settings(run, SECTIONS, PLAN)
    policy = f"{root}/models/org--policy"
    for name in ("import_model", *places):
        uri = f"{run}/{places[name]}" if name in places else policy
        monkeypatch.setattr(f"dice_core.stages.{name}.{name}", stand_in(name))
        metrics = FakeArtifact(tmp_path / "metrics")
        returned = component(name).python_func(settings_uri, places.get(name, "policy"), metrics)
        assert returned == (("refused",) if name == "evaluate" else None)
        assert metrics.metadata.pop("task") == tasks[name]
        # Of an evaluation KFP's table has the numbers that tell most.
        shown = {} if name == "evaluate" else {"count": 3}
        assert metrics.metadata == {**shown, "status": "completed", "uri": uri}
    assert called["pair"]["scores_uris"] == [f"{run}/iteration-1/score/shard-{i}-of-2" for i in (0, 1)]
    assert called["pair"]["responses_uris"] == [f"{run}/iteration-1/generate/shard-{i}-of-2" for i in (0, 1)]
    assert called["evaluate"]["promoted_uri"] == f"{root}/promoted/p.json"
    assert (called["train"]["training"], called["train"]["pods"]) == ({"beta": 0.2}, {})
    assert called["train"]["pairs_uri"] == f"{run}/iteration-1/pair"
    assert {called[name]["policy_uri"] for name in ("prepare_data", "pair", "train")} == {policy}
    assert {called[name]["data_uri"] for name in ("pair", "evaluate")} == {f"{run}/data"}
    models = {"policy": f"{run}/iteration-1/train", "previous": policy, "first": policy, "judge": ""}
    models |= {"base_reference": f"{root}/models/org--reference"}
    assert {name: called["evaluate"][f"{name}_uri"] for name in models} == models
    assert called["prepare_data"]["exclude_source"] == "s3://b/exclude"


def test_the_task_of_two_stages_calls_both_and_shows_the_metrics_of_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of responses that are there: else generate runs in a process of its own, see test_generate_and_score.py."""
    called = {}

    def stand_in(name: str) -> Any:
        signature = inspect.signature(stage_function(name))

        def stage(*args: Any, **kwargs: Any) -> StageReport:
            called[name] = signature.bind(*args, **kwargs).arguments
            return StageReport(called[name]["output_uri"], "already complete", {"count": 3, "seconds": 0.5})

        return stage

    for name in ("generate", "score"):
        monkeypatch.setattr(f"dice_core.stages.{name}.{name}", stand_in(name))
    root = str(tmp_path / "root")
    run = layout.run(root, "r")
    responses, scores = (layout.shard(run, 2, name, 0, 2) for name in ("generate", "score"))
    publish_files(responses, {}, Manifest(stage="generate", fingerprint="f", files={}))
    metrics = FakeArtifact(tmp_path / "metrics")
    settings_uri = write_settings(run, {**SECTIONS, "scoring": {"reward": "reward-model"}}, PLAN)
    component("generate_and_score").python_func(
        settings_uri, "iteration-2/generate-and-score/shard-0-of-2", metrics=metrics
    )
    policy, data = f"{run}/iteration-1/train", f"{run}/data"
    of_both = {"iteration": 2, "shard": 0, "num_shards": 2, "gate_uri": f"{run}/iteration-1/evaluate", "data_uri": data}
    of_both |= {"output_uri": responses, "generation": {"num_responses": 3}, "seed": 5, "policy_uri": policy}
    assert {name: called["generate"][name] for name in of_both} == of_both
    assert called["score"] == {
        "policy_uri": policy,
        "reference_uri": f"{root}/models/org--policy",
        "responses_uri": responses,
        "output_uri": scores,
        "reward_uri": f"{root}/models/org--reward",
        "data_uri": data,
        "scoring": {"reward": "reward-model"},
        "grading": {},
        "seed": 5,
    }
    shown = {
        f"{stage}_{name}": value for stage in ("generate", "score") for name, value in (("count", 3), ("seconds", 0.5))
    }
    shown |= {"status": "already complete", "uri": scores, "task": "iteration 2: generate and score 1 of 2"}
    assert metrics.metadata == shown


@pytest.mark.parametrize(
    ("status", "metrics", "decision"),
    [
        ("completed", {"accepted": 1, "promotable": 0}, "accepted"),
        ("already complete", {"accepted": 0}, "refused"),
        ("skipped", {}, "refused"),
    ],
)
def test_evaluate_returns_its_decision(
    status: Any, metrics: dict[str, int], decision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "dice_core.stages.evaluate.evaluate", lambda *args, **kwargs: StageReport(args[4], status, dict(metrics))
    )
    settings_uri = write_settings(layout.run(str(tmp_path), "r"), SECTIONS, PLAN)
    shown = FakeArtifact(tmp_path / "metrics")
    assert component("evaluate").python_func(settings_uri, "iteration-1/evaluate", shown) == (decision,)


@pytest.mark.parametrize("name", ["pair", "train"])
def test_the_warm_start_has_a_place_and_settings_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: dict[str, Any] = {}

    def stage(*args: Any, **kwargs: Any) -> StageReport:
        called.update(kwargs)
        return StageReport(args[2], "completed", {})

    monkeypatch.setattr(f"dice_core.stages.{name}.{name}", stage)
    run = layout.run(str(tmp_path), "r")
    metrics = FakeArtifact(tmp_path / "metrics")
    component(name).python_func(write_settings(run, SECTIONS, PLAN), f"warm-start/{name}", metrics)
    assert metrics.metadata["uri"] == f"{run}/warm-start/{name}"
    assert called.get("training", {"beta": 0.3}) == {"beta": 0.3} and not called.get("scores_uris")


def test_settings_that_were_changed_since_they_were_checked_are_refused(tmp_path: Path) -> None:
    run = layout.run(str(tmp_path), "r")
    settings_uri = write_settings(run, SECTIONS, PLAN)
    assert read_task(settings_uri, "iteration-1/train").plan == PLAN
    Path(settings_uri).write_text(Path(settings_uri).read_text().replace("0.2", "0.4"))
    with pytest.raises(StorageError, match="changed since check-settings wrote it"):
        read_task(settings_uri, "iteration-1/train")


def test_a_run_whose_first_task_failed_has_a_report_that_says_so(tmp_path: Path) -> None:
    """The report is the last task of every run, also of one that has made nothing."""
    page, table, metrics = (FakeArtifact(tmp_path / name) for name in ("page", "table", "metrics"))
    given = {"root": str(tmp_path / "root"), "run": "r", "job_id": "", "num_iterations": 2}
    component("report").python_func(**given, page=page, table=table, metrics=metrics)
    assert "not started" in Path(page.path).read_text()
    assert "No verdict yet" in Path(table.path).read_text()
    assert metrics.metadata == {"outcome": "unfinished"}


def test_a_model_that_was_imported_elsewhere_and_carried_over_is_asked_of_nobody(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What manifests/README.md tells a site without the internet to do."""
    with monkeypatch.context() as connected:
        connected.setattr(models, "bring", lambda *_: tiny_model)
        import_model("Org/Tiny", str(tmp_path / "connected"))
    shutil.copytree(tmp_path / "connected", tmp_path / "root" / "models" / "org--tiny")
    monkeypatch.setattr(models, "bring", lambda *_: pytest.fail("the Hub was asked"))
    settings_uri = write_settings(layout.run(str(tmp_path / "root"), "r"), {}, {"policy_source": "Org/Tiny"})
    metrics = FakeArtifact(tmp_path / "metrics")
    component("import_model").python_func(settings_uri, "policy", metrics)
    assert metrics.metadata["uri"] == str(tmp_path / "root" / "models" / "org--tiny")
    assert metrics.metadata["status"] == "already complete"

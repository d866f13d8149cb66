"""A run as MLflow sees it: begun by check-settings, its stages below it, ended by the report."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dice_core.preferences.settings import PairingConfig
from dice_core.settings.base import ConfigError
from dice_core.stages.check_settings import check_settings_task
from dice_core.stages.report import report_task
from dice_core.stages.run_status import run_status
from dice_core.stages.runner import StageContext, run_stage
from dice_core.stages.table import EVALUATE, PAIR, PREPARE_DATA
from dice_core.storage import layout
from dice_core.storage.failures import StageFailure
from dice_core.storage.manifest import Manifest, publish_files
from dice_core.storage.run_contents import RunContents
from dice_core.tracking import feed
from tests.mlflow_server import MlflowServer

Work = Callable[[StageContext], Manifest]
_LONG = 60.0


@pytest.fixture
def experiment(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"stages-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    monkeypatch.setattr(feed.Feed.end, "__kwdefaults__", {"seconds": _LONG, "tells": True})
    return name


def pair(uri: str, work: Work, inputs: dict[str, str] | None = None) -> str:
    """Run a stage of that name whose work is given."""
    settings, arguments = {"pairing": PairingConfig(replay_ratio=0.25)}, {"seed": 3}
    return run_stage(PAIR, uri, work, settings=settings, arguments=arguments, inputs=inputs or {}).status


def finishes(context: StageContext) -> Manifest:
    return context.publish({}, {"num_generated_pairs": 5, "length_penalty": 0.5, "reason": "a text"})


@pytest.mark.slow
def test_every_attempt_of_a_stage_is_one_run_that_says_how_it_ended(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path
) -> None:
    uri, seen = layout.stage(str(tmp_path / "runs" / "r"), 1, "pair"), []

    def ends_with(error: BaseException) -> Work:
        def work(context: StageContext) -> Manifest:
            raise error

        return work

    for error in (ConfigError("pairing.x: wrong"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            pair(uri, ends_with(error))
        seen.append(mlflow_server.runs(experiment)[1]["status"])
    assert pair(uri, finishes) == "completed"
    assert pair(uri, finishes) == "already complete"
    parent, stage = mlflow_server.runs(experiment)
    assert [*seen, stage["status"]] == ["FAILED", "KILLED", "FINISHED"]
    assert stage["params"].items() >= {"pairing.replay_ratio": "0.25", "seed": "3"}.items()
    assert stage["metrics"] == {"num_generated_pairs": 5.0, "length_penalty": 0.5}
    assert mlflow_server.history(parent["run_id"], "pair/length_penalty") == [(1, 0.5)]
    # One that an earlier stage left nothing to do is no run.
    skipped = Manifest(stage=PREPARE_DATA.name, fingerprint="", files={}, skipped="the policy was refused")
    publish_files(str(tmp_path / "skipped"), {}, skipped)
    inputs = {"data": str(tmp_path / "skipped")}
    assert pair(layout.stage(str(tmp_path / "runs" / "r"), 2, "pair"), finishes, inputs) == "skipped"
    assert len(mlflow_server.runs(experiment)) == 2


@pytest.mark.slow
def test_a_run_begins_with_its_plan_and_ends_with_its_last_task(
    mlflow_server: MlflowServer, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "0b1d")
    root = str(tmp_path)
    plan = {"num_iterations": 1, "num_shards": 2, "seed": 7, "promote_as": "zephyr"}
    sources = dict.fromkeys(("preferences_source", "prompts_source", "exclude_source"), "")
    models = {"policy_source": "org/policy", "reference_source": "org/reference"}
    name, _ = check_settings_task(root, "zephyr-1", "job", "", {}, **plan, **sources, **models, training={"beta": 0.2})
    uri = layout.run(root, name)
    (parent,) = mlflow_server.runs(experiment)
    assert (parent["run_name"], parent["status"]) == (name, "RUNNING")
    assert {"num_shards": "2", "policy_source": "org/policy", "training.beta": "0.2"}.items() <= parent[
        "params"
    ].items()
    assert {"dice.uri": uri, "kfp.run_id": "0b1d"}.items() <= parent["tags"].items()

    artifacts = [Page(str(tmp_path / name)) for name in ("page.html", "table.md", "metrics")]
    report_task(root, name, "job", 1, *artifacts, "", "")
    (parent,) = mlflow_server.runs(experiment)
    assert parent["status"] == "KILLED"
    # It is continued, and its gate has the last word.
    check_settings_task(root, name, "job", "", {}, **plan, **sources, **models, training={"beta": 0.2})
    assert mlflow_server.runs(experiment)[0]["status"] == "RUNNING"
    refused = Manifest(stage=EVALUATE.name, fingerprint="", files={}, metrics={"accepted": 0, "reason": "longer"})
    publish_files(layout.stage(uri, 1, "evaluate"), {}, refused)
    report_task(root, name, "job", 1, *artifacts, "", "")
    (parent,) = mlflow_server.runs(experiment)
    assert parent["status"] == "FINISHED"


@dataclass
class Page:
    """An artifact of KFP's of the report."""

    path: str
    metadata: dict[str, Any] = field(default_factory=dict)


def evaluated(*accepted: int) -> RunContents:
    manifests = {
        f"iteration-{number}/evaluate": Manifest(
            stage=EVALUATE.name, fingerprint="", files={}, metrics={"accepted": value}
        )
        for number, value in enumerate(accepted, start=1)
    }
    return RunContents("s3://b/runs/r", manifests=manifests)


@pytest.mark.parametrize(
    ("contents", "status"),
    [
        (evaluated(), None),
        (evaluated(1), None),
        (evaluated(1, 1), "FINISHED"),
        (evaluated(1, 0), "FINISHED"),
        (evaluated(0), "FINISHED"),
    ],
)
def test_a_run_of_two_iterations_is_finished_when_the_last_was_measured_or_one_was_refused(
    contents: RunContents, status: str | None
) -> None:
    assert run_status(contents, 2) == status


def test_a_run_with_a_failure_has_failed() -> None:
    failure = StageFailure(stage=PREPARE_DATA.name, reason="x", is_final=True, time="", pod="", node="")
    assert run_status(RunContents("s3://b/runs/r", failures=(failure,)), 1) == "FAILED"

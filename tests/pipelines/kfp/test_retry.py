"""`make retry`: KFP's own retry where it can, and the same pipeline and settings anew where it never will."""

import argparse
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.kfp.follow import Pace
from pipelines.kfp.retry import retry
from tests.cluster_objects import ClusterObjects
from tests.kfp_api import KfpServer
from tests.kfp_recordings import recorded
from tests.pipelines.kfp.conftest import WORKFLOWS, Recording

pytestmark = pytest.mark.slow

EIGHT = "workflow-eight-shards-under-way"


def test_a_run_that_failed_goes_on_as_the_same_run(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recording.add("run-training-failed")
    assert main(["retry", "--run", "faults"]) == 0
    assert run["state"] == "RUNNING" and len(kfp.runs) == 1
    printed = capsys.readouterr().out
    assert "run faults: goes on where it failed" in printed and "dice report" not in printed


def test_a_run_that_etcd_cannot_take_is_started_anew_with_its_own_version_and_settings(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight shards: HTTP 500, "etcdserver: request is too large"."""
    run = recording.add("run-eight-shards-cancelled", EIGHT)
    kfp.refusals[":retry"] = recorded("retry-too-large")
    assert main(["retry", "--run", "eight"]) == 0
    (started,) = kfp.posted("/runs")
    assert started["display_name"] == "eight"
    assert started["pipeline_version_reference"] == run["pipeline_version_reference"]
    assert started["runtime_config"]["parameters"] == run["runtime_config"]["parameters"]
    assert started["service_account"] == "dice-pipeline"
    printed = capsys.readouterr().out
    assert "request is too large" in printed and "started anew as eight, with its own pipeline and settings" in printed


def test_a_lost_recurring_run_is_started_anew_under_its_own_name(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its schedule was deleted: KFP says RUNNING for ever. By its whole name it takes what it chose before."""
    run = recording.add("run-of-deleted-schedule")
    own = f"again-{run['run_id'][:8]}"
    assert main(["retry", "--run", own]) == 0
    (started,) = kfp.posted("/runs")
    assert started["display_name"] == own
    assert started["runtime_config"]["parameters"] == {**run["runtime_config"]["parameters"], "run": own}
    assert f"run {own}: its workflow has gone, so it is started anew as {own}" in capsys.readouterr().out


def test_another_error_of_kfp_starts_nothing(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.add("run-training-failed")
    kfp.refusals[":retry"] = {"message": "the database is locked"}
    assert main(["retry", "--run", "faults"]) == 1
    assert not kfp.posted("/runs") and "the database is locked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "run", "message"),
    [
        ("run-retried-succeeded", "second", "run 'second' has SUCCEEDED: there is nothing to retry"),
        ("run-eight-shards-under-way", "eight", "run 'eight' is RUNNING: wait for its end"),
    ],
)
def test_only_what_has_ended_without_success_is_retried(
    name: str,
    run: str,
    message: str,
    recording: Recording,
    workflows: ClusterObjects,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recording.add(name, EIGHT if "eight" in name else "workflow-retried-succeeded")
    workflows.forbidden.add("/apis/argoproj.io/v1alpha1/namespaces/kubeflow/workflows")
    assert main(["retry", "--run", run]) == 1
    assert message in capsys.readouterr().err


def test_the_run_that_was_started_anew_is_the_one_that_is_followed(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.add("run-eight-shards-cancelled", EIGHT)
    workflows.forbidden.add("/apis/argoproj.io/v1alpha1/namespaces/kubeflow/workflows")
    kfp.refusals[":retry"] = recorded("retry-too-large")
    script: list[dict[str, Any]] = [{}, {"state": "RUNNING"}, {"state": "SUCCEEDED"}]
    kfp.script = script
    options = argparse.Namespace(host="", namespace="", context="", run="eight", wait=True)
    assert retry(options, Pace(poll=0.01)) == 0
    assert "run eight: SUCCEEDED" in capsys.readouterr().out


def test_a_run_that_is_being_stopped_is_not_to_be_cancelled_once_more(
    recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.add("run-eight-shards-under-way", EIGHT)["state"] = "CANCELING"
    workflows.objects[WORKFLOWS] = [recorded(EIGHT)]
    assert main(["retry", "--run", "eight"]) == 1
    error = capsys.readouterr().err
    assert "run 'eight' is being stopped: make retry when it has ended" in error and "make cancel" not in error

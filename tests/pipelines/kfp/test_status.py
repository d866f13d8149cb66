"""`make status`: what it says of runs as a real Kubeflow has them, and where it says that it does not know."""

import json
from pathlib import Path

import pytest

from dice_core.storage import layout
from dice_core.storage.failures import StageFailure, write_failure
from dice_core.storage.manifest import Manifest, publish_files
from pipelines.cli import main
from tests.cluster_objects import ClusterObjects
from tests.kfp_api import KfpServer
from tests.kfp_recordings import recorded
from tests.pipelines.kfp.conftest import WORKFLOWS, Recording

pytestmark = pytest.mark.slow

EIGHT = "workflow-eight-shards-under-way"


def status(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, dict[str, str]]:
    """Run the command; return its exit code, its first line, and the state of each task."""
    capsys.readouterr()
    code = main(["status", "--run", name])
    first, *lines = capsys.readouterr().out.splitlines()
    tasks = {
        line[2:30].strip(): line[30:].strip()
        for line in lines
        if line.startswith("  ") and "states are from" not in line
    }
    return code, first, {label: line.split("  ")[0] for label, line in tasks.items()}


def test_a_run_under_way_is_told_by_its_workflow(
    recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.add("run-eight-shards-under-way", EIGHT)
    workflows.objects[WORKFLOWS] = [recorded(EIGHT)]
    code, first, tasks = status("eight", capsys)
    assert code == 0 and first.startswith("run eight: RUNNING, ")
    assert "?" not in tasks.values()
    assert tasks["iteration 1: generate 4 of 8"] == tasks["iteration 1: score 2 of 8"] == "running"
    assert tasks["iteration 1: score 3 of 8"] == "pending" and tasks["iteration 1: pair"] == "waiting"


def test_without_the_workflow_what_kfp_does_not_know_is_a_question_mark(
    recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.add("run-eight-shards-under-way", EIGHT)
    workflows.forbidden.add(WORKFLOWS)
    code = main(["status", "--run", "eight"])
    printed = capsys.readouterr()
    assert code == 0 and "the states are those that KFP knows" in printed.err
    assert "states are from KFP's answer, which ends where a workflow grows past 1 MiB; ? is not known" in printed.out
    assert "warm start: train            ok" in printed.out
    assert "iteration 1: generate 4 of 8 ?" in printed.out


def test_what_is_not_known_otherwise_is_told_by_the_results(
    recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.add("run-eight-shards-under-way", EIGHT)
    workflows.forbidden.add(WORKFLOWS)
    run = layout.run(str(recording.root), "eight")
    publish_files(layout.shard(run, 1, "generate", 3, 8), {}, Manifest(stage="generate", fingerprint="f", files={}))
    _, _, tasks = status("eight", capsys)
    assert tasks["iteration 1: generate 4 of 8"] == "ok" and tasks["iteration 1: generate 3 of 8"] == "?"


def test_a_run_whose_schedule_was_deleted_under_it_is_lost_and_says_how_it_goes_on(
    recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    """KFP says RUNNING for ever."""
    run = recording.add("run-of-deleted-schedule")
    code, first, tasks = status(run["display_name"], capsys)
    assert code == 1
    assert ": lost: its workflow has gone" in first and "and KFP takes it for RUNNING" in first
    assert "continues it" in first
    assert set(tasks.values()) <= {"?", "ok"}


@pytest.mark.parametrize("is_known", [False, True])
def test_a_run_is_not_called_lost_by_a_cluster_that_may_be_another(
    is_known: bool, recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kubeconfig may lead to another cluster. A workflow of a run that KFP knows tells that it does not."""
    run = recording.add("run-of-deleted-schedule")
    del workflows.objects["/api/v1/namespaces/kubeflow/configmaps/dice-config"]
    other = recording.add("run-eight-shards-under-way", EIGHT) if is_known else {"run_id": "of-another-cluster"}
    metadata = {"name": "w", "labels": {"pipeline/runid": other["run_id"]}}
    workflows.objects[WORKFLOWS] = [{"metadata": metadata}]
    assert main(["status", "--run", run["display_name"]]) == int(is_known)
    printed = capsys.readouterr()
    assert (": lost: " in printed.out) == is_known
    assert ("is it the run's cluster? CONTEXT= names another" in printed.err) != is_known


def test_a_run_that_a_person_stopped_is_called_so(
    recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.add("run-eight-shards-cancelled", EIGHT)
    code, first, _ = status("eight", capsys)
    assert code == 1 and ": stopped (KFP calls it FAILED), " in first


def test_a_failed_task_shows_the_reason_that_its_stage_left(
    recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.add("run-training-failed")
    run = layout.run(str(recording.root), "faults")
    reason = StageFailure(
        stage="train",
        reason="no checkpoint fits: give it more disk",
        is_final=False,
        time="2026-11-29T00:00:00Z",
        pod="p1",
        node="dice-demo-x1(0).root(0).train(0).executor(2)",
    )
    write_failure(layout.stage(run, 1, "train"), reason)
    assert main(["status", "--run", "faults"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "iteration 1: train" in line]
    assert line.startswith("  iteration 1: train           FAILED  12m 27s  ")
    assert line.endswith("no checkpoint fits: give it more disk (attempt 3, pod p1)")


def test_a_pipeline_that_kfp_has_no_more_leaves_the_tasks_under_kfps_keys(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.add("run-training-failed")
    kfp.versions.clear()
    _, _, tasks = status("faults", capsys)
    assert tasks["iteration 1: train"] == "FAILED" and tasks["train"] == "ok"


def test_the_list_of_runs_shows_our_own_names_and_states(
    recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    recurring = recording.add("run-recurring-succeeded")
    recording.add("run-eight-shards-cancelled", EIGHT)
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    own = f"soon-{recurring['run_id'][:8]}"
    assert any(line.startswith(f"{own} (soonj7fkn-1-1032575986)") and "SUCCEEDED" in line for line in lines)
    assert any(line.startswith("eight ") and " stopped " in line for line in lines)


def test_pods_that_do_not_start_are_named_with_the_reason(
    recording: Recording, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = recording.add("run-eight-shards-under-way", EIGHT)
    workflows.objects[WORKFLOWS] = [recorded(EIGHT)]
    pod = {
        "metadata": {
            "name": "p1",
            "creationTimestamp": "2026-11-28T23:30:00Z",
            "labels": {"pipeline/runid": run["run_id"], "app.kubernetes.io/component": "score"},
        },
        "status": {
            "phase": "Pending",
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node fits"}
            ],
        },
    }
    workflows.objects["/api/v1/namespaces/kubeflow/pods"] = json.loads(json.dumps([pod]))
    assert main(["status", "--run", "eight"]) == 0
    assert "score does not run yet: " in capsys.readouterr().out

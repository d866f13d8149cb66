"""The states of tasks against what a real Kubeflow answered; see tests/data/kfp-2.17.0/README.md for what is true."""

import copy
import json
from collections import Counter
from typing import Any

import kfp_server_api
import pytest

from pipelines.cluster.workflow import parse_workflow
from pipelines.kfp.task_graph import graph_tasks
from pipelines.kfp.task_states import (
    TaskState,
    entries_by_path,
    kfp_states,
    moment,
    run_facts,
    workflow_states,
)
from tests.compiled_pipeline import compiled_spec
from tests.kfp_recordings import nodes_of, recorded, recorded_pipeline

ONE_SHARD, EIGHT_SHARDS = "workflow-retried-succeeded", "workflow-eight-shards-under-way"
NOW = moment("2026-11-28T23:33:00Z")
BEFORE = {"check settings": "ok", "import policy": "ok", "prepare data": "ok"}
WARM_START = {"warm start: pair": "ok", "warm start: train": "ok"}
RECORDED = [
    "run-failed-at-import",
    "run-retried-succeeded",
    "run-recurring-succeeded",
    "run-eight-shards-under-way",
    "run-eight-shards-cancelled",
    "run-cloned-in-ui-refused",
    "run-training-failed",
    "run-of-deleted-schedule",
]


class Answer:
    def __init__(self, body: Any) -> None:
        self.data = json.dumps(body)


def run_of(body: dict[str, Any]) -> Any:
    return kfp_server_api.ApiClient().deserialize(Answer(body), "V2beta1Run")


def shown(states: list[TaskState]) -> dict[str, str]:
    return {state.label: state.state for state in states}


def by_kfp(name: str, pipeline: str = ONE_SHARD) -> dict[str, str]:
    run = run_of(recorded(name))
    return shown(kfp_states(graph_tasks(recorded_pipeline(pipeline)), run, run_facts(run), NOW))


def iteration(number: int, **states: str) -> dict[str, str]:
    names = ("generate 1 of 1", "score 1 of 1", "pair", "train", "evaluate")
    default = states.pop("rest")
    return {f"iteration {number}: {name}": states.get(name.split()[0], default) for name in names}


def test_a_run_that_failed_at_its_first_stage_ran_nothing_after_it() -> None:
    assert by_kfp("run-failed-at-import") == {
        "check settings": "ok",
        "import policy": "FAILED",
        "prepare data": "not run",
        "warm start: pair": "not run",
        "warm start: train": "not run",
        **iteration(1, rest="not run"),
        **iteration(2, rest="not run"),
        "report": "ok",
    }


@pytest.mark.parametrize("name", ["run-training-failed", "run-cloned-in-ui-refused"])
def test_the_training_that_failed_is_iteration_1s_and_not_the_warm_starts(name: str) -> None:
    """Both have the key `train`, and KFP gives both the create_time of the run."""
    assert by_kfp(name) == {
        **BEFORE,
        **WARM_START,
        **iteration(1, rest="ok", train="FAILED", evaluate="not run"),
        **iteration(2, rest="not run"),
        "report": "ok",
    }


def test_all_of_a_run_that_succeeded_is_ok_where_kfps_answer_ends_early() -> None:
    """Cancelled, then retried: what KFP says of iteration 2 stopped at 1 MiB of workflow. A report may fail alone."""
    states = by_kfp("run-retried-succeeded")
    assert states.pop("report") == "ok"
    assert set(states.values()) == {"ok"} and len(states) == 15


def test_a_run_under_way_is_unknown_from_where_kfps_answer_ends() -> None:
    states = by_kfp("run-eight-shards-under-way", EIGHT_SHARDS)
    assert {label: state for label, state in states.items() if state != "?"} == {**BEFORE, **WARM_START}
    assert len(states) == 5 + 2 * 19 + 1


def test_what_a_stopped_run_did_after_kfps_answer_ends_is_unknown_and_not_failed() -> None:
    states = by_kfp("run-eight-shards-cancelled", EIGHT_SHARDS)
    assert {label: state for label, state in states.items() if state != "?"} == {**BEFORE, **WARM_START}


def test_a_run_that_a_person_stopped_is_called_stopped_until_it_is_retried() -> None:
    stopped = {name: run_facts(run_of(recorded(name))).label for name in RECORDED}
    assert stopped == {
        "run-failed-at-import": "FAILED",
        "run-retried-succeeded": "SUCCEEDED",
        "run-recurring-succeeded": "SUCCEEDED",
        "run-eight-shards-under-way": "RUNNING",
        "run-eight-shards-cancelled": "stopped",
        "run-cloned-in-ui-refused": "FAILED",
        "run-training-failed": "FAILED",
        "run-of-deleted-schedule": "RUNNING",
    }


@pytest.mark.parametrize("name", RECORDED)
def test_every_task_with_pods_is_placed_by_the_ids_of_its_children(name: str) -> None:
    """Argo makes a node's id of its name, so that a path is found or it is not: nothing is guessed by time."""
    details = run_of(recorded(name)).run_details.task_details
    placed = entries_by_path(details)
    expected = [d for d in details if d.child_tasks and d.state and not str(d.display_name).endswith(")")]
    assert len(placed) == len(expected) > 5
    assert all(path.rpartition(".")[2] in (detail.display_name, "onExit") for path, detail in placed.items() if path)


def by_workflow(workflow: dict[str, Any], run: str, now: float = NOW) -> list[TaskState]:
    pipeline = recorded_pipeline(EIGHT_SHARDS if "eight" in run else ONE_SHARD)
    facts = run_facts(run_of(recorded(run)))
    return workflow_states(graph_tasks(pipeline), parse_workflow(workflow), facts, now)


def test_the_workflow_tells_all_where_its_nodes_are_compressed() -> None:
    assert set(shown(by_workflow(recorded(ONE_SHARD), "run-retried-succeeded")).values()) == {"ok"}


def test_the_workflow_of_a_run_under_way_tells_each_shard() -> None:
    states = shown(by_workflow(recorded(EIGHT_SHARDS), "run-eight-shards-under-way"))
    generated = [states[f"iteration 1: generate {n} of 8"] for n in range(1, 9)]
    scored = [states[f"iteration 1: score {n} of 8"] for n in range(1, 9)]
    assert generated == ["ok", "ok", "ok", "running", "ok", "ok", "ok", "ok"]
    assert scored == ["ok", "running", "pending", "waiting", "ok", "ok", "ok", "ok"]
    assert Counter(states.values()) == Counter(ok=5 + 7 + 5, running=2, pending=1, waiting=1 + 3 + 19 + 1)


def test_shards_are_shown_in_the_order_of_their_numbers() -> None:
    labels = list(shown(by_workflow(recorded(EIGHT_SHARDS), "run-eight-shards-under-way")))
    generated = [label for label in labels if label.startswith("iteration 1: generate")]
    assert generated == [f"iteration 1: generate {n} of 8" for n in range(1, 9)]


def changed(workflow: dict[str, Any], path: str, **fields: Any) -> dict[str, Any]:
    """Return a workflow, uncompressed, with fields of the node of a path changed."""
    found = copy.deepcopy(workflow)
    nodes = nodes_of(found)
    del found["status"]["compressedNodes"]
    (node,) = [node for node in nodes.values() if node["name"].endswith(path)]
    node |= fields
    found["status"]["nodes"] = nodes
    return found


SCORE = "iteration-1(0).score-2(0).executor"


def test_a_task_between_two_attempts_says_which_comes_next_and_when() -> None:
    """KFP's backoff is 60 s, doubled with each attempt; the recorded task may have three."""
    body = changed(recorded(EIGHT_SHARDS), f"{SCORE}(0)", phase="Failed", finishedAt="2026-11-28T23:32:40Z")
    (state,) = [s for s in by_workflow(body, "run-eight-shards-under-way") if s.label == "iteration 1: score 2 of 8"]
    assert (state.state, state.note) == ("retrying", "attempt 2 of 3, the next in 40s")


def test_a_task_at_its_second_attempt_says_so() -> None:
    body = changed(recorded(EIGHT_SHARDS), f"{SCORE}(0)", phase="Failed", finishedAt="2026-11-28T23:32:00Z")
    second = next(node for node in body["status"]["nodes"].values() if node["name"].endswith(f"{SCORE}(0)")).copy()
    second |= {"id": "second", "name": second["name"].replace(f"{SCORE}(0)", f"{SCORE}(1)"), "phase": "Running"}
    body["status"]["nodes"]["second"] = second
    (state,) = [s for s in by_workflow(body, "run-eight-shards-under-way") if s.label == "iteration 1: score 2 of 8"]
    assert (state.state, state.note) == ("running", "attempt 2 of 3")


def test_what_a_person_stopped_is_stopped_and_what_failed_before_is_failed() -> None:
    """The recorded run was stopped at 23:33:48: its history says CANCELING."""
    at, before = "2026-11-28T23:33:50Z", "2026-11-28T23:32:00Z"
    for finished, expected in ((at, "stopped"), (before, "FAILED")):
        body = changed(recorded(EIGHT_SHARDS), "iteration-1(0).score-2", phase="Failed", finishedAt=finished)
        body["status"]["phase"] = "Failed"
        states = shown(by_workflow(body, "run-eight-shards-cancelled", moment(at)))
        assert states["iteration 1: score 2 of 8"] == expected
        assert states["iteration 1: pair"] == "not run"


def test_tasks_inside_a_condition_that_did_not_hold_are_skipped() -> None:
    body = changed(recorded(EIGHT_SHARDS), "iteration-1(0).score-2", phase="Running")
    nodes = body["status"]["nodes"]
    workflow = body["metadata"]["name"]
    name = f"{workflow}(0).root(0).exit-handler-1(0).condition-2"
    nodes["skipped"] = {"id": "skipped", "name": name, "type": "Skipped", "phase": "Skipped"}
    states = shown(by_workflow(body, "run-eight-shards-under-way"))
    assert {state for label, state in states.items() if label.startswith("iteration 2")} == {"skipped"}


def test_nodes_that_are_kept_elsewhere_are_not_taken_for_none() -> None:
    body = recorded(EIGHT_SHARDS)
    del body["status"]["compressedNodes"]
    assert parse_workflow(body).nodes == ()
    body["status"]["offloadNodeStatusVersion"] = "fnv:1"
    assert parse_workflow(body).nodes is None


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 8, 64])
def test_the_pipeline_of_today_is_read_with_any_number_of_shards(num_shards: int) -> None:
    tasks = graph_tasks(compiled_spec("demo", [f"num_shards={num_shards}"]))
    assert len(tasks) == 3 + 2 + 2 * (num_shards + 3) + 1
    places = [place.below for task in tasks if task.place for place in task.place.parts]
    assert f"iteration-2/score/shard-{num_shards - 1}-of-{num_shards}" in places
    assert "warm-start/train" in places and "iteration-1/evaluate" in places and "report" in places
    assert len({task.path for task in tasks}) == len({task.label for task in tasks}) == len(tasks)

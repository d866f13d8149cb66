"""The states of stages, of which a task may run two: what is told with and without the run's results."""

import pytest

from dice_core.stages.place import Place
from pipelines.cluster.workflow import Node, Workflow
from pipelines.kfp.stage_states import Results, stage_states, tell_more
from pipelines.kfp.task_graph import GraphTask, graph_tasks
from pipelines.kfp.task_states import RunFacts, TaskState, moment, workflow_states
from tests.compiled_pipeline import compiled_spec
from tests.kfp_recordings import recorded_pipeline

BOTH = Place("generate-and-score", 1, 2, 8)
TASKS = [GraphTask("root.x", BOTH.label, place=BOTH)]
GENERATE, SCORE = "iteration-1/generate/shard-2-of-8", "iteration-1/score/shard-2-of-8"
Rows = list[tuple[str, str, float, str]]


def rows(state: TaskState, results: Results | None) -> Rows:
    return [(told.label, told.state, told.seconds, told.note) for told in stage_states([state], TASKS, results)]


def told(
    state: str, *complete: str, note: str = "", seconds: float = 0.0, **reasons: str
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return state and note of generate and of score, of a task in a state."""
    places = {"generate": GENERATE, "score": SCORE}
    results = Results(complete, {places[stage]: reason for stage, reason in reasons.items()})
    first, second = rows(TaskState(BOTH.label, state, seconds, note), results)
    assert (first[0], second[0]) == ("iteration 1: generate 3 of 8", "iteration 1: score 3 of 8")
    return (first[1], first[3]), (second[1], second[3])


COMPLETE = ("ok", "its results are complete")


@pytest.mark.parametrize("state", ["running", "pending", "starting", "retrying"])
def test_the_first_stage_that_is_to_do_has_the_state_of_the_task(state: str) -> None:
    note = "attempt 2 of 3"
    assert told(state, note=note) == ((state, note), ("waiting", ""))
    assert told(state, GENERATE, note=note) == (COMPLETE, (state, note))
    # Its pod has yet to end.
    assert told(state, GENERATE, SCORE) == (COMPLETE, (state, ""))


def test_the_stage_that_left_a_reason_has_failed() -> None:
    assert told("FAILED", note="exit 1", generate="no memory") == (("FAILED", "no memory"), ("not run", ""))
    assert told("FAILED", GENERATE, note="exit 1", score="not finite") == (COMPLETE, ("FAILED", "not finite"))
    # A result of other settings: generate refuses it, and is what there is to mend.
    assert told("FAILED", GENERATE, SCORE, generate="other settings") == (("FAILED", "other settings"), ("not run", ""))


def test_of_a_task_that_was_killed_the_stage_without_results_has_failed() -> None:
    assert told("FAILED", note="OOMKilled") == (("FAILED", "OOMKilled"), ("not run", ""))
    assert told("FAILED", GENERATE, note="OOMKilled") == (COMPLETE, ("FAILED", "OOMKilled"))
    assert told("stopped", GENERATE) == (COMPLETE, ("stopped", ""))
    assert told("stopped") == (("stopped", ""), ("not run", ""))


def test_results_that_went_are_not_called_complete() -> None:
    """Score has a reason, and generate has no manifest (any more)."""
    assert told("FAILED", score="responses are not finished") == (
        ("?", ""),
        ("FAILED", "responses are not finished"),
    )


@pytest.mark.parametrize("state", ["ok", "skipped", "not run", "waiting"])
@pytest.mark.parametrize("results", [None, Results((), {})])
def test_a_task_before_and_after_its_work_tells_both_of_its_stages(state: str, results: Results | None) -> None:
    task = TaskState(BOTH.label, state)
    assert not tell_more([task], TASKS)
    assert rows(task, results) == [
        ("iteration 1: generate 3 of 8", state, 0.0, ""),
        ("iteration 1: score 3 of 8", state, 0.0, ""),
    ]


@pytest.mark.parametrize("state", ["running", "pending", "starting", "retrying", "FAILED", "stopped", "?"])
def test_without_the_results_a_task_is_told_as_a_whole(state: str) -> None:
    """Which of its stages it is at, nobody says."""
    task = TaskState(BOTH.label, state, 61.0, "attempt 2 of 3")
    assert tell_more([task], TASKS)
    assert rows(task, None) == [("iteration 1: generate and score 3 of 8", state, 61.0, "attempt 2 of 3")]


def test_what_nobody_knows_of_a_task_its_results_tell_of_each_stage() -> None:
    last = "KFP's last word: RUNNING"
    assert told("?", GENERATE, note=last) == (COMPLETE, ("?", last))
    assert told("?", note=last, generate="no disk") == (("?", "its last attempt failed: no disk"), ("?", last))


def test_the_time_of_a_task_stands_at_its_last_stage_with_whose_it_is() -> None:
    task = TaskState(BOTH.label, "ok", 7200.0)
    assert [row[2:] for row in rows(task, None)] == [(0.0, ""), (7200.0, "with generate")]
    running = TaskState(BOTH.label, "running", 60.0)
    assert [row[2:] for row in rows(running, Results((), {}))] == [(60.0, ""), (0.0, "")]


@pytest.mark.slow
def test_the_pipeline_of_today_under_way_tells_the_stages_of_each_shard() -> None:
    tasks = graph_tasks(compiled_spec("demo", ["num_shards=2"]))
    first, second = [task for task in tasks if task.label.startswith("iteration 1: generate and score")]
    since = "2026-11-28T23:32:00Z"
    nodes = [Node(path, None, "Running", "", since, "", {}) for path in (first.path, second.path)]
    nodes += [Node(f"{path}.executor", 0, "Running", "", since, "", {}) for path in (first.path, second.path)]
    facts = RunFacts("RUNNING", is_final=False)
    states = workflow_states(tasks, Workflow("Running", tuple(nodes)), facts, moment(since))
    assert tell_more(states, tasks)
    results = Results({"iteration-1/generate/shard-1-of-2"}, {})
    found = {state.label: state.state for state in stage_states(states, tasks, results)}
    assert len(found) == 3 + 2 + 2 * (2 * 2 + 3) + 1
    assert {label: state for label, state in found.items() if state != "waiting"} == {
        "iteration 1: generate 1 of 2": "running",
        "iteration 1: generate 2 of 2": "ok",
        "iteration 1: score 2 of 2": "running",
    }
    whole = {state.label: state.state for state in stage_states(states, tasks)}
    assert [label for label, state in whole.items() if state == "running"] == [first.label, second.label]


def test_tasks_of_one_stage_are_told_as_pipelines_of_older_versions_have_them() -> None:
    tasks = graph_tasks(recorded_pipeline("workflow-eight-shards-under-way"))
    states = [TaskState(task.label, "FAILED" if task.label == "import policy" else "?") for task in tasks]
    complete = {GENERATE, "iteration-1/train"}
    found = stage_states(states, tasks, Results(complete, {"iteration-1/pair": "no scores", "data": "not read"}))
    assert len(found) == len(tasks)
    assert {state.label: (state.state, state.note) for state in found if state.note} == {
        "iteration 1: generate 3 of 8": COMPLETE,
        "iteration 1: train": COMPLETE,
        "iteration 1: pair": ("?", "its last attempt failed: no scores"),
        "prepare data": ("?", "its last attempt failed: not read"),
    }


def test_states_of_a_pipeline_that_is_not_known_stay_as_they_are() -> None:
    states = [TaskState("iteration-1-generate-and-score-3", "running"), TaskState("train", "?")]
    assert stage_states(states, [], Results((), {})) == states

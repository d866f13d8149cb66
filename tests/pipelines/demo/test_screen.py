"""From kfp.local's log to lines for a person."""

import io

from dice_core.storage.manifest import Manifest
from pipelines.demo.screen import Screen, describe, task_labels
from pipelines.dice import build_pipeline
from pipelines.presets import demo, on_this_machine

LINE = "-" * 80


def shown(*lines: str, labels: dict[str, list[str]] | None = None) -> tuple[Screen, list[str]]:
    out = io.StringIO()
    screen = Screen(labels or {"generate": ["iteration 1: generate 1 of 1"]}, lambda uri: f"<{uri}>", out)
    for line in lines:
        screen.feed(line + "\n")
    return screen, out.getvalue().splitlines()


def status(value: str) -> str:
    """Return how kfp prints the metrics artifact of a task."""
    return f"{' ' * 22}metadata={{'num_x': 3.0, 'status': '{value}', 'uri': 's3://b/x'}} )"


STARTED = "10:00:00.000 - INFO - Executing task \x1b[96m'generate'\x1b[0m"
ENDED = "10:00:09.000 - INFO - Task \x1b[96m'generate'\x1b[0m finished with status \x1b[92mSUCCESS\x1b[0m"
FAILED = "10:00:09.000 - ERROR - Task \x1b[96m'generate'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m"


def test_a_finished_task_is_one_line_with_what_it_made() -> None:
    _, lines = shown(STARTED, '    {"inputs": {}}', ENDED, status("completed"), LINE)
    assert lines == ["[ 1/1] iteration 1: generate 1 of 1: 0 s; <s3://b/x>"]


def test_progress_is_shown_and_other_output_is_not() -> None:
    noise = ["    INFO 10:00:03 engine.py:12 loading", "    [KFP Executor 2026-01-01 10:00:01,000 INFO]: x", "    text"]
    _, lines = shown(
        STARTED, *noise, "    10:00:05 generate shard 1/1: 5 of 9 prompts", "    [default0]:10:00:06 step 2"
    )
    assert lines == ["        generate shard 1/1: 5 of 9 prompts", "        step 2"]


def test_what_was_there_already_is_said() -> None:
    known = "    10:00:05 generate: already complete: s3://b/x"
    _, lines = shown(STARTED, known, ENDED, status("already complete"), LINE)
    assert lines == ["[ 1/1] iteration 1: generate 1 of 1: already complete; <s3://b/x>"]


def test_a_skipped_stage_is_told_from_a_finished_one() -> None:
    reason = "    10:00:05 generate: skipped: refused"
    _, lines = shown(STARTED, reason, ENDED, status("skipped"), LINE)
    assert lines == ["[ 1/1] iteration 1: generate 1 of 1: skipped"]


def test_the_first_error_of_a_task_is_kept() -> None:
    trace = [
        "    Traceback (most recent call last):",
        "    dice_core.settings.base.ConfigError: chat.x: wrong",
        "    ValueError: y",
    ]
    screen, lines = shown(STARTED, *trace, FAILED, LINE)
    assert screen.fault == "iteration 1: generate 1 of 1: chat.x: wrong"
    assert lines == ["[ 1/1] iteration 1: generate 1 of 1: FAILED"]


def test_the_task_that_failed_is_told_from_the_one_that_reports_on_it() -> None:
    """A process that the kernel ends tells no error; what the report then lacks is not the cause."""
    report = [line.replace("generate", "report") for line in (STARTED, "    ValueError: no run", FAILED, LINE)]
    screen, _ = shown(STARTED, FAILED, LINE, *report)
    assert (screen.label, screen.fault) == ("iteration 1: generate 1 of 1", "")


def test_an_error_that_a_task_got_over_is_not_the_fault_of_the_next() -> None:
    ended = [ENDED, status("completed"), LINE]
    labels = {"generate": ["one", "two"]}
    screen, _ = shown(STARTED, "    OSError: tried again", *ended, STARTED, "    ValueError: y", FAILED, labels=labels)
    assert (screen.label, screen.fault) == ("two", "two: y")


def test_the_task_at_work_is_known_when_the_log_breaks_off() -> None:
    screen, _ = shown(STARTED, "    10:00:05 generate: 5 of 9 prompts")
    assert (screen.label, screen.fault) == ("iteration 1: generate 1 of 1", "")


def test_every_task_of_the_demo_has_a_label() -> None:
    pipeline = build_pipeline(on_this_machine(demo()))
    labels = [label for values in task_labels(pipeline.pipeline_spec).values() for label in values]
    assert len(labels) == len(set(labels)) == 14
    assert {
        "check settings",
        "import policy",
        "warm start: train",
        "iteration 2: generate and score 1 of 1",
        "report",
    } <= set(labels)


def test_counts_are_put_in_words() -> None:
    metrics = {"num_prompts": 28, "num_responses": 112, "seconds": 3.0}
    assert (
        describe(Manifest(stage="generate", fingerprint="", files={}, metrics=metrics)) == "28 prompts, 112 responses"
    )
    metrics = {"num_steps": 8, "first_loss": 0.69314, "last_loss": 0.5}
    manifest = Manifest(stage="train", fingerprint="", files={}, metrics=metrics)
    assert describe(manifest) == "8 steps, first loss 0.6931, last loss 0.5"

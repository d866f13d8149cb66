"""The place of a task in a run, and what its artifact shows."""

import math
from typing import Any

import pytest

from dice_core.stages.place import MAX_SHOWN, Place, show, show_parts
from dice_core.stages.runner import StageReport
from dice_core.stages.table import GENERATE, SCORE


@pytest.mark.parametrize(
    ("place", "uri", "key", "label"),
    [
        (Place("prepare-data"), "s3://b/runs/r/data", "prepare-data", "prepare data"),
        (Place("report"), "s3://b/runs/r/report", "report", "report"),
        (Place("import-model"), "", "import-model", "import model"),
        (Place("pair", 0), "s3://b/runs/r/warm-start/pair", "warm-start-pair", "warm start: pair"),
        (Place("train", 3), "s3://b/runs/r/iteration-3/train", "iteration-3-train", "iteration 3: train"),
        (
            Place("score", 2, 2, 8),
            "s3://b/runs/r/iteration-2/score/shard-2-of-8",
            "iteration-2-score-3",
            "iteration 2: score 3 of 8",
        ),
        (
            Place("generate-and-score", 2, 2, 8),
            "s3://b/runs/r/iteration-2/generate-and-score/shard-2-of-8",
            "iteration-2-generate-and-score-3",
            "iteration 2: generate and score 3 of 8",
        ),
    ],
)
def test_address_key_and_label_follow_from_the_place(place: Place, uri: str, key: str, label: str) -> None:
    assert (place.uri("s3://b", "r"), place.key, place.label) == (uri, key, label)
    assert place.below == uri.removeprefix("s3://b/runs/r/")


def test_a_task_of_two_stages_leaves_its_results_at_their_places() -> None:
    task = Place.parse("iteration-2/generate-and-score/shard-2-of-8")
    assert task.parts == (Place("generate", 2, 2, 8), Place("score", 2, 2, 8))
    assert Place("train", 1).parts == (Place("train", 1),)


class Artifact:
    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}


def test_a_metric_that_kfps_launcher_cannot_take_is_shown_as_text() -> None:
    """Null and NaN end the task in the launcher, after the stage has done all its work."""
    metrics: dict[str, Any] = {"loss": 0.5, "gap": math.nan, "most": math.inf, "accuracy": None, "reason": "as it is"}
    artifact = Artifact()
    show(StageReport("s3://b/x", "completed", metrics), Place("train", 1), artifact)
    assert artifact.metadata == {
        "loss": 0.5,
        "gap": "nan",
        "most": "inf",
        "accuracy": "?",
        "reason": "as it is",
        "status": "completed",
        "uri": "s3://b/x",
        "task": "iteration 1: train",
    }


def test_a_task_shows_at_most_15_numbers_and_those_of_its_stages_choice_first() -> None:
    """Evaluate measures some forty."""
    choice = ("win_rate", "heldout_reward_accuracy")
    metrics: dict[str, Any] = {f"number_{i}": i for i in range(40)} | dict.fromkeys(choice, 0.5) | {"reason": "better"}
    artifact = Artifact()
    show(StageReport("s3://b/x", "completed", metrics), Place("evaluate", 1), artifact)
    numbers = [name for name, value in artifact.metadata.items() if isinstance(value, int | float)]
    assert len(numbers) == MAX_SHOWN == 15
    assert numbers == [*choice, *(f"number_{i}" for i in range(13))]
    assert artifact.metadata["reason"] == "better"


def test_two_stages_in_one_artifact_show_what_tells_most_and_then_what_is_not_0() -> None:
    sampled = {"num_prompts": 22, "num_duplicate_responses": 0, "num_responses": 88, "seconds": 40.5}
    scored = {"num_dropped_empty": 0, "num_dropped_too_long": 3, "num_scored": 64, "reward_std": math.nan}
    scored |= {f"num_dropped_{number}": 0 for number in range(20)}
    artifact, place = Artifact(), Place("generate-and-score", 1, 0, 1)
    reports = [(GENERATE, StageReport("s3://b/g", "already complete", dict(sampled)))]
    reports += [(SCORE, StageReport("s3://b/s", "completed", dict(scored)))]
    show_parts(reports, place, artifact)
    assert artifact.metadata["uri"] == "s3://b/s"
    end = {"status": "completed", "uri": "s3://b/s", "task": "iteration 1: generate and score 1 of 1"}
    assert artifact.metadata.items() >= end.items()
    names = list(artifact.metadata)[:-3]
    assert len(names) == MAX_SHOWN
    assert names[:6] == [
        "generate_num_prompts",
        "generate_num_responses",
        "score_num_scored",
        "score_reward_std",
        "generate_seconds",
        "score_num_dropped_too_long",
    ]
    assert artifact.metadata["score_reward_std"] == "nan"


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (("already complete", "already complete"), "already complete"),
        (("already complete", "completed"), "completed"),
        (("skipped", "skipped"), "skipped"),
    ],
)
def test_a_task_of_two_stages_has_done_something_if_one_of_them_has(statuses: Any, expected: str) -> None:
    artifact = Artifact()
    reports = [
        (stage, StageReport("s3://b", status, {})) for stage, status in zip((GENERATE, SCORE), statuses, strict=True)
    ]
    show_parts(reports, Place("generate-and-score", 1, 0, 1), artifact)
    assert artifact.metadata["status"] == expected

"""The place of a task in a run, and what its artifact shows."""

import math
from typing import Any

import pytest

from dice_core.stages.place import MAX_SHOWN_NUMBERS, Place, show
from dice_core.stages.runner import StageReport


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
    ],
)
def test_address_key_and_label_follow_from_the_place(place: Place, uri: str, key: str, label: str) -> None:
    assert (place.uri("s3://b", "r"), place.key, place.label) == (uri, key, label)
    assert place.below == uri.removeprefix("s3://b/runs/r/")


class Artifact:
    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}


def test_a_metric_that_kfps_launcher_cannot_take_is_shown_as_text() -> None:
    """Null and NaN end the task in the launcher, after the stage has done all its work."""
    metrics: dict[str, Any] = {"loss": 0.5, "gap": math.nan, "most": math.inf, "accuracy": None, "reason": "as it is"}
    artifact = Artifact()
    uri = show(StageReport("s3://b/x", "completed", metrics), Place("train", 1), artifact)
    assert uri == "s3://b/x"
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
    choice = ("heldout_reward_accuracy_incumbent", "heldout_reward_accuracy")
    metrics: dict[str, Any] = {f"number_{i}": i for i in range(40)} | dict.fromkeys(choice, 0.5) | {"reason": "better"}
    artifact = Artifact()
    show(StageReport("s3://b/x", "completed", metrics), Place("evaluate", 1), artifact)
    numbers = [name for name, value in artifact.metadata.items() if isinstance(value, int | float)]
    assert len(numbers) == MAX_SHOWN_NUMBERS == 15
    assert numbers == [*choice, *(f"number_{i}" for i in range(13))]
    assert artifact.metadata["reason"] == "better"

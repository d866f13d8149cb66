"""When Argo's object says that a run is being stopped."""

from typing import Any

import pytest

from dice_core.launch.cancellation import is_being_stopped


def workflow(metadata: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "run", "uid": "1", **metadata}, "spec": spec}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (workflow({}, {}), False),
        (workflow({}, {"activeDeadlineSeconds": None}), False),
        (workflow({}, {"activeDeadlineSeconds": 3600}), False),
        (workflow({}, {"activeDeadlineSeconds": 0}), True),
        (workflow({}, {"shutdown": "Stop"}), True),
        (workflow({"deletionTimestamp": "2026-11-28T23:30:00Z"}, {}), True),
        (workflow({"uid": "2"}, {}), True),
        (None, True),
    ],
)
def test_a_run_is_being_stopped_by_a_deadline_of_zero_a_shutdown_or_its_deletion(found: Any, expected: bool) -> None:
    assert is_being_stopped(found, "1") == expected

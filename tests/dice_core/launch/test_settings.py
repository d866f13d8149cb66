"""Sections launch and pods: what cannot go together is refused before anything starts."""

from typing import Any

import pytest

from dice_core.launch.settings import LaunchConfig, PodConfig, parse_launch
from dice_core.settings.base import ConfigError


@pytest.mark.parametrize(
    ("launch", "pods", "message"),
    [
        ({"num_nodes": 2}, {}, "launch: num_nodes must be 1 with backend 'torchrun', which has one machine, got 2"),
        (
            {},
            {"cpu": "8"},
            "launch.backend: 'torchrun' starts no pods, and pods.cpu is set: leave out section pods, or set launch.b",
        ),
        (
            {"backend": "pytorchjob"},
            {},
            "pods.image: backend 'pytorchjob' needs the image of the training pods, got ''",
        ),
        ({"backend": "trainjob"}, {}, "pods.image: backend 'trainjob' needs the image of the training pods, got ''"),
        (
            {"backend": "trainjob", "restart_policy": "ExitCode"},
            {"image": "x"},
            "launch.restart_policy: must be OnFailure or Never with backend 'trainjob', which knows no exit codes of",
        ),
        (
            {"backend": "trainjob"},
            {"image": "x", "priority_class": "high"},
            "pods.priority_class: a TrainJob cannot set it, leave it out, got 'high': name a TrainingRuntime in",
        ),
        (
            {"backend": "trainjob"},
            {"image": "x", "clean_pod_policy": "All"},
            "pods.clean_pod_policy: a TrainJob cannot set it, leave it out, got 'All': pods that have ended",
        ),
        (
            {"backend": "trainjob"},
            {"image": "x", "ttl_seconds_after_finished": 60},
            "pods.ttl_seconds_after_finished: a TrainJob cannot set it, leave it out, got 60: it stays until the",
        ),
        ({"backend": "pytorchjob"}, {"image": "x", "cpus": "8"}, "pods.cpus: unknown setting, did you mean 'cpu'?"),
    ],
)
def test_what_does_not_go_together_is_one_line(launch: dict[str, Any], pods: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_launch(launch, pods)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_setting_is_in_both_sections() -> None:
    assert not LaunchConfig.model_fields.keys() & PodConfig.model_fields.keys()

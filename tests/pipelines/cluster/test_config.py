"""The cluster section: quantities, times, and what cannot go together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.settings.base import ConfigError
from dice_core.settings.durations import show_duration, to_seconds
from dice_core.settings.quantities import quantity
from dice_core.stages.attempts import NODE_VARIABLE
from dice_core.stages.table import GENERATE, IMPORT_MODEL, PAIR, REPORT
from pipelines.cluster.config import ATTEMPT_VARIABLE, ClusterConfig


@pytest.mark.parametrize(
    ("text", "value"), [("8", 8), ("500m", 0.5), ("1.5", 1.5), ("64Gi", 64 * 2**30), ("2G", 2e9), ("1Ti", 2**40)]
)
def test_quantities_are_those_of_kubernetes(text: str, value: float) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800)])
def test_times_are_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert to_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "0d", "-1h", "1.5h", "7 d", "1h30m", "7D"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 30m, 12h or 7d"):
        to_seconds(text)


@given(st.integers(1, 10_000), st.sampled_from("smhd"))
def test_a_shown_time_is_the_time(number: int, unit: str) -> None:
    seconds = to_seconds(f"{number}{unit}")
    shown = sum(to_seconds(word) for word in show_duration(seconds).split())
    assert shown <= seconds < shown + to_seconds("1h")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"gpu_task_memory": "64 GB"},
            "gpu_task_memory: must be a Kubernetes quantity such as 8, 500m or 64Gi",
        ),
        ({"train_timeout": "1w"}, "cluster.train_timeout: must be a whole number and one of s, m, h, d"),
        ({"gpu_task_shm_size": "96Gi"}, "gpu_task_shm_size must be less than gpu_task_memory"),
        (
            {"gpu_tolerations": [{"keys": "x"}]},
            "effect, key, operator, tolerationSeconds, value, and not keys",
        ),
        ({"gpu_selector": {}}, "did you mean 'gpu_node_selector'"),
        ({"clean_pod_policy": "Some"}, "'Running', 'All' or 'None'"),
        ({"run_as_user": -1}, "cluster.run_as_user"),
        ({"env": {"A-B": "x"}}, "a variable has letters, digits and '_' in its name, got 'A-B'"),
        ({"env": {"AWS_REGION": "x"}}, "env: AWS_REGION comes from the config map dice-config, set it there"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "comes from cluster.credentials_secret"),
        ({"env": {"HF_TOKEN": "x"}}, "env: HF_TOKEN belongs into a secret, see env_secret"),
        ({"env": {"WANDB_API_KEY": "x"}}, "env: WANDB_API_KEY belongs into a secret, see tracking_secret"),
        ({"env": {"MLFLOW_TRACKING_URI": "https://me:x@m"}}, "env: MLFLOW_TRACKING_URI holds a name or a password"),
        ({"tracking_secret_keys": ["TOKEN"]}, "begins with MLFLOW_ or WANDB_, got 'TOKEN'"),
        (
            {"env_secret": "a", "tracking_secret": "b", "env_secret_keys": ["MLFLOW_TRACKING_TOKEN"]},
            "tracking_secret_keys: MLFLOW_TRACKING_TOKEN is among env_secret_keys too",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.parse(values, "cluster")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_bare_number_of_the_command_line_is_a_quantity() -> None:
    assert ClusterConfig.parse({"gpu_task_cpu": 4, "cpu_task_cpu": 0.5}, "cluster").gpu_task_cpu == "4"


def test_a_stage_without_a_timeout_of_its_own_has_that_of_cpu_tasks() -> None:
    cluster = ClusterConfig(generate_timeout="2h", cpu_task_timeout="10m")
    assert cluster.timeout_seconds(GENERATE) == 7200
    assert {cluster.timeout_seconds(stage) for stage in (PAIR, REPORT, IMPORT_MODEL)} == {600}


def test_a_pod_is_told_which_attempt_of_its_task_it_is() -> None:
    assert ATTEMPT_VARIABLE == NODE_VARIABLE

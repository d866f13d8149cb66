"""What training pods ask for beside what was chosen, and what is recorded of them, by hand."""

import pytest

from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.stages.train import ran_by, sized
from dice_core.training.settings import TrainingConfig

POLICY = {"num_parameters": 70_553_706_496}
TWO_NODES = LaunchConfig(backend="pytorchjob", num_nodes=2, processes_per_node=8)
OFFLOADED = TrainingConfig(deepspeed="zero3", offload_optimizer="cpu")


def test_pods_ask_for_the_disk_that_the_model_needs_and_a_choice_stays() -> None:
    # 4 GiB, and a parameter's bytes on a node: two halves of a checkpoint, the model in bfloat16, the policy.
    assert sized(PodConfig(), POLICY, TrainingConfig(deepspeed="zero3"), TWO_NODES).disk == f"{4 + 1183}Gi"
    assert sized(PodConfig(disk="9Gi"), POLICY, TrainingConfig(), TWO_NODES).disk == "9Gi"
    assert sized(PodConfig(), {}, OFFLOADED, TWO_NODES) == PodConfig(), "nothing is known of the model"


def test_states_in_memory_raise_the_request_for_it_to_what_they_take_and_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = PodConfig(memory="400Gi")
    assert sized(chosen, POLICY, TrainingConfig(deepspeed="zero3"), TWO_NODES).memory == "400Gi"
    assert not capsys.readouterr().err
    assert sized(chosen, POLICY, OFFLOADED, TWO_NODES).memory == "1675Gi"
    assert "a pod asks for 1675Gi of memory, not 400Gi" in capsys.readouterr().err
    assert sized(PodConfig(memory="1800Gi"), POLICY, OFFLOADED, TWO_NODES).memory == "1800Gi"


def test_a_trained_model_says_which_processes_trained_it_and_how_they_shared_the_states() -> None:
    assert ran_by(TWO_NODES, OFFLOADED) == {
        "runner": "pytorchjob",
        "num_nodes": 2,
        "processes_per_node": 8,
        "data_parallel_size": 16,
        "zero_stage": 3,
        "offload_optimizer": "cpu",
    }
    assert ran_by(LaunchConfig(), TrainingConfig())["zero_stage"] == 0

"""What is measured of the machine: this one's processors and memory, and nvidia-smi's table."""

import os
from pathlib import Path

import pytest

from dice_core.tracking.system_metrics import read_gpus, system_metrics


def test_this_machines_processors_and_memory_are_measured() -> None:
    found = system_metrics()
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/system_memory_usage_percentage"] <= 100
    assert found["system/system_memory_usage_megabytes"] > 100


def test_each_gpu_of_nvidia_smis_table_has_its_numbers() -> None:
    assert read_gpus("0, 45, 20480, 81920, 310.52\n1, 0, 0, 81920, [N/A]\n") == {
        "gpu_0_utilization_percentage": 45.0,
        "gpu_0_memory_usage_megabytes": pytest.approx(20480 * 1.048576),
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_power_usage_watts": 310.52,
        "gpu_1_utilization_percentage": 0.0,
        "gpu_1_memory_usage_megabytes": 0.0,
        "gpu_1_memory_usage_percentage": 0.0,
    }
    assert read_gpus("NVIDIA-SMI has failed because it couldn't communicate with the driver.\n") == {}


@pytest.mark.parametrize("script", ["echo '0, 45, 20480, 81920, 310.52'", "echo 'No devices were found'; exit 6"])
def test_the_program_is_asked_where_it_is_there_and_its_failure_is_no_number(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = system_metrics()
    assert found.get("system/gpu_0_utilization_percentage") == (None if "exit" in script else 45.0)
    assert "system/cpu_utilization_percentage" in found

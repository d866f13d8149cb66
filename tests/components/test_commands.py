"""How KFP starts a component: `python3 -m components`, which hands its function to KFP's executor."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from components import images
from dice_core.stages.run_settings import write_settings
from dice_core.storage import layout

NO_STAGES = ("__init__", "__main__", "component", "images")
NAMES = sorted(path.stem for path in Path(images.__file__).parent.glob("*.py") if path.stem not in NO_STAGES)


@pytest.mark.parametrize("name", NAMES)
def test_a_component_s_pod_runs_this_package_and_carries_no_source(name: str) -> None:
    container = getattr(importlib.import_module(f"components.{name}"), name).component_spec.implementation.container
    assert container.command == ["python3", "-m", "components", "kfp.dsl.executor_main"]
    assert container.args == ["--executor_input", "{{$}}", "--function_to_execute", name]


@pytest.mark.slow
def test_kfp_s_executor_calls_the_function_with_its_inputs_and_stores_what_it_tells(tmp_path: Path) -> None:
    """From any folder: what the run's settings say of a judge, that it is not used, is in the metrics' metadata."""
    plan = {"judge_source": "org/judge"}
    settings_uri = write_settings(layout.run(str(tmp_path / "root"), "r"), {"judging": {"judge": "none"}}, plan)
    artifact = {"name": "metrics", "type": {"schemaTitle": "system.Metrics"}, "uri": str(tmp_path / "metrics")}
    told = tmp_path / "output_metadata.json"
    given = {
        "inputs": {"parameterValues": {"settings_uri": settings_uri, "role": "judge"}},
        "outputs": {"artifacts": {"metrics": {"artifacts": [artifact]}}, "outputFile": str(told)},
    }
    command = [sys.executable, "-m", "components", "kfp.dsl.executor_main", "--executor_input", json.dumps(given)]
    root = str(Path(images.__file__).parents[1])
    subprocess.run(
        [*command, "--function_to_execute", "import_model"],
        cwd=tmp_path,
        env={"PYTHONPATH": root},
        check=True,
        capture_output=True,
    )
    (metrics,) = json.loads(told.read_text())["artifacts"]["metrics"]["artifacts"]
    assert metrics["metadata"] == {"status": "skipped", "uri": "", "task": "import model"}

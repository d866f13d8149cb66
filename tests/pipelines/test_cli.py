"""`python -m pipelines`: files, messages and exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.cli import main
from tests.kfp_api import running_kfp_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_compile_writes_the_pipeline_with_the_changed_settings(tmp_path: Path) -> None:
    output = tmp_path / "dice.yaml"
    command = [sys.executable, "-m", "pipelines", "compile", "--preset", "llama3", "-o", str(output)]
    subprocess.run([*command, "--set", "training.beta=0.05", "iterations=1", "--set", "seed=7"], cwd=ROOT, check=True)
    spec = next(yaml.safe_load_all(output.read_text()))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["training"]["defaultValue"]["beta"] == 0.05
    assert parameters["seed"]["defaultValue"] == 7
    assert "comp-iteration-1" in spec["components"] and "comp-iteration-2" not in spec["components"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "zefyr", "-o", "x.yaml"], "did you mean 'zephyr'"),
        (["--set", "training.bta=1", "-o", "x.yaml"], "did you mean 'beta'"),
        (["-o", "pipeline.txt"], "must end in .yaml or .yml, got 'pipeline.txt'"),
        (["-o", "/nowhere/pipeline.yaml"], "/nowhere is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("cluster.trainer_cpu=2", "cluster.trainer_cpu: a run on this machine has no section cluster"),
        ("launch.backend=pytorchjob", "launch.backend: a run on this machine trains with torchrun, got 'pytorchjob'"),
    ],
)
def test_a_run_on_this_machine_refuses_what_is_of_a_cluster(
    assignment: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--preset", "demo", "--root", "nowhere", "--set", assignment]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


def test_a_run_with_an_impossible_name_is_refused_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--preset", "demo", "--root", "nowhere", "--run", "My Run"]) == 1
    assert "got 'My Run'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["settings", "--preset", "demo"], 0),
        (["status"], 0),
        (["schedule", "--preset", "demo", "--every", "7d", "--dry-run"], 141),
    ],
)
def test_a_reader_that_goes_away_is_no_error(arguments: list[str], code: int) -> None:
    """As `| head` does; make says "Error" of every code but 0."""
    reader, writer = os.pipe()
    os.close(reader)
    with running_kfp_server() as server:
        server.runs = [{"run_id": "r", "display_name": "x", "state": "RUNNING", "created_at": "2026-01-01T00:00:00Z"}]
        environment = os.environ | {"KFP_HOST": server.host, "DICE_ROOT": "s3://bucket/dice"}
        command = [sys.executable, "-m", "pipelines", *arguments]
        result = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    os.close(writer)
    assert (result.returncode, result.stderr) == (code, "")

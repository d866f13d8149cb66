"""What kfp.local does to a pipeline that the cluster does not."""

import re
import sys
from pathlib import Path

import pytest
from kfp import dsl, local

from pipelines.demo.local_run import LocalRunError, interpreter_by_name, run_locally
from pipelines.overrides import apply_overrides, find_preset
from pipelines.presets import on_this_machine


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def echo(text: str) -> str:
    import sys

    return f"{sys.executable} {text}"


def test_a_path_with_python3_in_it_reaches_the_task_unchanged(tmp_path: Path) -> None:
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    text = "/usr/lib/python3.11/site-packages/model.gguf"
    with interpreter_by_name():
        executable, received = echo(text=text).output.split(" ")
    assert received == text
    assert Path(executable).parent == Path(sys.executable).parent


@pytest.mark.slow
def test_a_run_without_a_name_gets_a_fresh_one_that_all_of_its_tasks_know(tmp_path: Path) -> None:
    """The first import fails: what has run till then is check-settings, and the report at the end."""
    preset = apply_overrides(on_this_machine(find_preset("demo")), ["policy_source=/no/such/model", "iterations=1"])
    for _ in range(2):
        with pytest.raises(LocalRunError):
            run_locally(preset, {"root": str(tmp_path / "root")}, tmp_path / "work")
    runs = sorted((tmp_path / "root" / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert re.fullmatch(r"demo-[0-9a-z]{8}", run.name)
        assert (run / "check-settings" / "manifest.json").exists() and (run / "report" / "report.html").exists()

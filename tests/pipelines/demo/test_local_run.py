"""What kfp.local does to a pipeline that the cluster does not."""

import sys
from pathlib import Path

from kfp import dsl, local

from pipelines.demo.local_run import interpreter_by_name


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

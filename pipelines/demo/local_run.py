"""Runs the pipeline of a preset on this machine: the same pipeline object, its components in subprocesses, one by one.

kfp.local does the work and writes its log to standard output; demo.py makes that readable.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.presets import Preset

_STOP_SECONDS = 10


class LocalRunError(RuntimeError):
    """A task of the pipeline failed; its own error is in the output above."""


def run_locally(preset: Preset, parameters: Mapping[str, Any], work_folder: Path) -> None:
    """Run a preset's pipeline to its end.

    Args:
        preset: from on_this_machine; decides the graph and the defaults of the parameters.
        parameters: `root`, and what differs from the preset.
        work_folder: gets what kfp calls artifacts: metrics and the report. The data go to `root`.

    Raises:
        LocalRunError: a task failed.
    """
    from kfp import local

    from pipelines.demo import process_tree
    from pipelines.dice import build_pipeline

    # The packages are found by the subprocesses where this process found them, installed or not.
    paths = [str(Path(__file__).resolve().parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # Said of each task: that its image is not used here, and that display names are not shown.
    warnings.filterwarnings("ignore", module=r"kfp\.local\..*")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(work_folder))
    process_tree.adopt_orphans()
    with process_tree.one_stop_request():
        try:
            with interpreter_by_name():
                build_pipeline(preset)(**parameters)
        except KeyboardInterrupt:
            process_tree.stop_descendants(_STOP_SECONDS, are_told=True)
            raise
        except RuntimeError as error:
            raise LocalRunError(f"the run stopped: {error}") from None


@contextmanager
def interpreter_by_name() -> Iterator[None]:
    """Let kfp.local call this interpreter `python3`, found on PATH.

    It writes sys.executable over every "python3" in a task's command, inside the parameters too: a path such as
    /usr/lib/python3/model.gguf would be spoilt. The name written over itself changes nothing.
    """
    executable, path = sys.executable, os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(executable).parent), path])
    sys.executable = "python3"
    try:
        yield
    finally:
        sys.executable = executable
        os.environ["PATH"] = path

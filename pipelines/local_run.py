"""Runs the pipeline of a preset on this machine: the same pipeline object, its components in subprocesses, one by one.

kfp.local does the work and writes its log to standard output; demo.py makes that readable.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.presets import Preset


class LocalRunError(RuntimeError):
    """A task of the pipeline failed; its own error is in the output above."""


def run_locally(preset: Preset, parameters: Mapping[str, Any], work_folder: Path) -> None:
    """Run a preset's pipeline to its end.

    Args:
        preset: decides the graph and the defaults of the parameters.
        parameters: `root`, and what differs from the preset.
        work_folder: gets what kfp calls artifacts: metrics and the report. The data go to `root`.

    Raises:
        LocalRunError: a task failed.
    """
    from kfp import local

    from pipelines.dice import build_pipeline

    # The packages are found by the subprocesses where this process found them, installed or not.
    paths = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # Said of each task: that its image is not used here, and that display names are not shown.
    warnings.filterwarnings("ignore", module=r"kfp\.local\..*")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(work_folder))
    try:
        build_pipeline(preset)(**parameters)
    except RuntimeError as error:
        raise LocalRunError(f"the run stopped: {error}") from None

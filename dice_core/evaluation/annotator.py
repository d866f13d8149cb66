"""Runs AlpacaEval's own annotator: the program alpaca_eval, of an environment of its own (requirements/alpaca.lock).

The package does not fit into the other environments. alpaca.py reads what it writes.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dice_core.child_processes import end_with_parent
from dice_core.progress import doing, log
from dice_core.settings.base import ConfigError

PROGRAM_VARIABLE = "DICE_ALPACA_EVAL"
"""Path of the program."""


class AnnotatorError(RuntimeError):
    """alpaca_eval ended without a result. The message is one line; what it said stands above it."""


def find_program() -> str:
    """Return the path of alpaca_eval.

    Raises:
        ConfigError: there is none.
    """
    found = shutil.which(os.environ.get(PROGRAM_VARIABLE) or "alpaca_eval")
    if found is None:
        raise ConfigError(
            "annotator: no program alpaca_eval here: install requirements/alpaca.lock into an environment of its own "
            f"(pip install --no-deps -r), and set {PROGRAM_VARIABLE} to its bin/alpaca_eval"
        )
    return found


def annotate(outputs: Path, baseline: Path, annotator: str, folder: Path, kept: Path) -> None:
    """Compare a model's outputs with a baseline's; leaderboard.csv and annotations.json go below a folder.

    Args:
        outputs: JSON of the model.
        baseline: JSON of the baseline, with the same instructions.
        annotator: one of the package's, or the path of a configuration.
        folder: is made.
        kept: file of the verdicts so far: those that it holds are not asked for again.

    Raises:
        AnnotatorError: the program failed.
    """
    kept.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    options: Mapping[str, Any] = {
        "model_outputs": outputs,
        "reference_outputs": baseline,
        "annotators_config": annotator,
        "output_path": folder,
        "caching_path": kept,
        # It would read other models' results, and write into its own package.
        "precomputed_leaderboard": None,
        "is_cache_leaderboard": False,
        "metric_kwargs": {"save_weights_dir": None},
    }
    _run([find_program(), *(f"--{name}={value}" for name, value in options.items())])


def _run(command: Sequence[str]) -> None:
    log(f"alpaca_eval begins: {command[0]}")
    last = ""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
    )
    with doing("waiting for the annotator"), process:
        for line in process.stdout or ():
            # Progress bars write over their line, and each call of an API would be one more.
            said = line.rpartition("\r")[2].strip()
            if said and "HTTP Request" not in said and "it/s]" not in said:
                last = said
                log(f"alpaca_eval: {said}")
    if process.returncode:
        raise AnnotatorError(f"alpaca_eval ended with {process.returncode}: {last or 'it said nothing'}")

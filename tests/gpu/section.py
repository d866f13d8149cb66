"""One section in a process of its own: `python -m tests.gpu.section NAME SCALE RESULT_FILE`."""

import importlib
import json
import sys
from pathlib import Path

import torch

from tests.gpu.scale import SCALES


def main(name: str, scale: str, result: str) -> None:
    """Measure, and write the numbers; what is wrong is raised."""
    if SCALES[scale].device == "cpu":
        # With more, threads of tiny matrices mostly wait for each other.
        torch.set_num_threads(1)
    numbers = importlib.import_module(f"tests.gpu.{name}").measure(SCALES[scale])
    Path(result).write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])

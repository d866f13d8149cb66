"""One section in a process of its own: `python -m tests.gpu.section NAME SCALE RESULT_FILE`.

What it has measured is kept as it comes: a section that runs out of time has shown that much.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

from tests.gpu.scale import SCALES


def main(name: str, scale: str, result: str) -> None:
    """Measure, and write the numbers so far whenever there are more; what is wrong is raised."""
    if SCALES[scale].device == "cpu":
        # With more, threads of tiny matrices mostly wait for each other.
        torch.set_num_threads(1)
    file = Path(result)
    for numbers in importlib.import_module(f"tests.gpu.{name}").measure(SCALES[scale]):
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(numbers))
        unfinished.replace(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
